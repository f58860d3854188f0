//! The client: against our server, and against stores that lie.
#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use gnttab_xenstore::client::{Client, Error, Nodes as _};
use gnttab_xenstore::perms::Perms;
use gnttab_xenstore::server::{Server, ServerHandle};
use gnttab_xenstore::wire::{Message, Reply, Request};
use gnttab_xenstore::{DomId, Errno, Quotas};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

fn server() -> (ServerHandle, Client) {
    let server = Server::new(Quotas::default()).spawn().unwrap();
    let client = server.connect().unwrap();
    (server, client)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn at_once() -> Option<Instant> {
    Some(Instant::now())
}

#[test]
fn nodes_can_be_read_and_written() {
    let (_server, mut client) = server();
    client.write("/a/text", "five").unwrap();
    client.write("/a/number", 5.to_string()).unwrap();
    client.write("/a/bytes", [0, 0xff]).unwrap();
    client.mkdir("/a/dir").unwrap();
    assert_eq!(
        client.directory("/a").unwrap(),
        ["bytes", "dir", "number", "text"]
    );
    assert_eq!(client.read_text("/a/text").unwrap(), "five");
    assert_eq!(client.read_number::<u8>("/a/number").unwrap(), 5);
    assert_eq!(client.read("/a/bytes").unwrap(), [0, 0xff]);
    assert_eq!(client.read_if_there("/a/none").unwrap(), None);
    let perms: Perms = "n0,r5".parse().unwrap();
    client.set_perms("/a", &perms).unwrap();
    assert_eq!(client.perms("/a").unwrap(), perms);
    client.rm("/a").unwrap();
    assert!(client.read("/a").unwrap_err().is_missing());
    assert_eq!(client.domain_path(DomId::new(7)).unwrap(), "/local/domain/7");
}

#[test]
fn errors_name_what_failed() {
    let (_server, mut client) = server();
    client.write("/a", [0xff]).unwrap();
    let text = |error: Error| error.to_string();
    assert_eq!(
        text(client.read("/b/c").unwrap_err()),
        "the store refused READ /b/c: ENOENT (no such node, watch, transaction or domain)"
    );
    assert_eq!(text(client.read("/b//c").unwrap_err()), "`/b//c` is no path");
    assert_eq!(
        text(client.read_number::<u32>("/a").unwrap_err()),
        "the value of /a is `\\xff`, which is no number of the wanted range"
    );
    assert_eq!(
        text(client.write("/a", [0; 4096]).unwrap_err()),
        "WRITE /a does not fit a message"
    );
    client.write("/a", [0; 4093]).unwrap();
    client.write("/a", "256").unwrap();
    assert!(matches!(client.read_number::<u8>("/a"), Err(Error::Value { .. })));
    assert_eq!(client.read_number::<u16>("/a").unwrap(), 256);
}

#[test]
fn long_directories_are_read_in_parts() {
    let (_server, mut client) = server();
    let names: Vec<_> = (0..1000).map(|i| format!("name-{i:04}")).collect();
    for name in &names {
        client.mkdir(&format!("/d/{name}")).unwrap();
    }
    assert_eq!(client.directory("/d").unwrap(), names);
    let within = client.transaction(|tx| tx.directory("/d")).unwrap();
    assert_eq!(within, names);
}

#[test]
fn events_wait_while_other_things_are_done() {
    let (server, mut client) = server();
    let mut other = server.connect().unwrap();
    let a = client.watch("/a").unwrap();
    let b = client.watch("/b").unwrap();
    other.write("/a/x", "v").unwrap();
    other.write("/b", "v").unwrap();
    client.write("/c", "v").unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = client.next_event(Some(soon())).unwrap().unwrap();
        seen.push((event.watch, event.place.to_string()));
    }
    // The first event of /b and that of its change wait as one.
    let expected = [(a, "/a"), (b, "/b"), (a, "/a/x")];
    assert_eq!(seen, expected.map(|(watch, place)| (watch, place.to_owned())));
    assert_eq!(client.next_event(at_once()).unwrap(), None);

    other.write("/a", "v").unwrap();
    client.unwatch(a).unwrap();
    assert_eq!(
        client.next_event(at_once()).unwrap(),
        None,
        "an ended watch is silent"
    );
    assert_eq!(client.unwatch(a).unwrap_err().errno(), Some(Errno::ENOENT));
    client.reset_watches().unwrap();
    other.write("/b", "v").unwrap();
    assert_eq!(client.next_event(at_once()).unwrap(), None);
}

#[test]
fn a_refused_watch_leaves_nothing() {
    let server = Server::new(Quotas {
        watches: 1,
        ..Quotas::default()
    })
    .spawn()
    .unwrap();
    server.introduce_domain(DomId::new(5)).unwrap();
    let mut client = server.connect_domain(DomId::new(5)).unwrap();
    let first = client.watch("a").unwrap();
    assert_eq!(client.watch("b").unwrap_err().errno(), Some(Errno::E2BIG));
    client.unwatch(first).unwrap();
    client.watch("b").unwrap();
}

#[test]
fn wait_for_sees_every_value_that_stays() {
    let (server, mut client) = server();
    let mut other = server.connect().unwrap();
    let writer = thread::spawn(move || {
        for state in 0..=50 {
            other.write("/dev/state", state.to_string()).unwrap();
            other.write("/dev/noise", state.to_string()).unwrap();
        }
    });
    let quiet = client.watch("/elsewhere").unwrap();
    let mut seen = Vec::new();
    let value = client
        .wait_for("/dev/state", soon(), |value| {
            let value: u32 = std::str::from_utf8(value?).unwrap().parse().unwrap();
            seen.push(value);
            (value == 50).then_some(value)
        })
        .unwrap();
    writer.join().unwrap();
    assert_eq!(value, 50);
    assert!(seen.is_sorted());
    let event = client.next_event(at_once()).unwrap().unwrap();
    assert_eq!(event.watch, quiet, "events of others are kept");
    assert_eq!(client.next_event(at_once()).unwrap(), None, "its own are not");
}

#[test]
fn wait_for_ends_at_its_deadline_and_leaves_no_watch() {
    let (_server, mut client) = server();
    client.write("/state", "1").unwrap();
    for (path, last) in [
        ("/state", "waited in vain for /state, which is 1"),
        ("/none", "waited in vain for /none, which is missing"),
    ] {
        let deadline = Instant::now() + Duration::from_millis(30);
        let result = client.wait_for(path, deadline, |_| None::<()>);
        assert!(Instant::now() >= deadline);
        assert_eq!(result.unwrap_err().to_string(), last);
    }
    client.write("/state", "2").unwrap();
    assert_eq!(client.next_event(at_once()).unwrap(), None);
}

#[test]
fn wait_for_tells_of_a_node_that_vanishes() {
    let (server, mut client) = server();
    let five = DomId::new(5);
    server.introduce_domain(five).unwrap();
    client.write("/local/domain/5/state", "4").unwrap();
    client
        .set_perms("/local/domain/5", &"n5".parse().unwrap())
        .unwrap();
    let mut before = false;
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        server.release_domain(five).unwrap();
        server
    });
    client
        .wait_for("/local/domain/5/state", soon(), |value| {
            before |= value.is_some();
            value.is_none().then_some(())
        })
        .unwrap();
    assert!(before);
    drop(killer.join().unwrap());
}

#[test]
fn transactions_are_tried_again_until_nobody_interferes() {
    const EACH: u32 = 50;
    let (server, mut client) = server();
    client.write("/counter", "0").unwrap();
    let counters: Vec<_> = (0..4)
        .map(|_| {
            let mut client = server.connect().unwrap();
            thread::spawn(move || {
                for _ in 0..EACH {
                    let result = client.transaction(|tx| {
                        let value: u32 = tx.read_number("/counter")?;
                        tx.write("/counter", (value + 1).to_string())
                    });
                    match result {
                        Ok(()) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for counter in counters {
        counter.join().unwrap();
    }
    assert_eq!(client.read_number::<u32>("/counter").unwrap(), 4 * EACH);
}

#[test]
fn a_transaction_that_always_conflicts_is_given_up() {
    let (server, mut client) = server();
    let mut other = server.connect().unwrap();
    let mut runs = 0;
    let result = client.transaction(|tx| {
        runs += 1;
        let value = tx.read_if_there("/a")?.unwrap_or_default();
        other.write("/a", runs.to_string())?;
        tx.write("/b", value)
    });
    assert!(matches!(result, Err(Error::Conflict { attempts: 64 })));
    assert_eq!(runs, 64);
    assert_eq!(client.read_if_there("/b").unwrap(), None);
    client.write("/c", "").unwrap();
}

#[test]
fn a_transaction_can_be_begun_and_ended_by_hand() {
    let (_server, mut client) = server();
    let tx = client.begin().unwrap();
    client.within(tx).write("/a", "1").unwrap();
    assert!(client.read("/a").unwrap_err().is_missing());
    assert!(client.end(tx, true).unwrap());
    assert_eq!(client.end(tx, true).unwrap_err().errno(), Some(Errno::ENOENT));

    let tx = client.begin().unwrap();
    client.within(tx).write("/a", "2").unwrap();
    client.write("/a", "3").unwrap();
    assert!(!client.end(tx, true).unwrap(), "a conflict");
    assert_eq!(client.read("/a").unwrap(), b"3");
}

#[test]
fn a_transaction_that_fails_leaves_nothing_open() {
    let (server, _) = server();
    server.introduce_domain(DomId::new(5)).unwrap();
    let mut client = server.connect_domain(DomId::new(5)).unwrap();
    for _ in 0..20 {
        // More than the quota of open transactions.
        let result = client.transaction(|tx| tx.read("/secret"));
        assert_eq!(result.unwrap_err().errno(), Some(Errno::EACCES));
    }
}

/// A store that answers the first request with these bytes, and closes.
fn liar(answer: impl FnOnce(&Message) -> Vec<u8> + Send + 'static) -> Client {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut bytes = vec![0; 16];
        theirs.read_exact(&mut bytes).unwrap();
        bytes.resize(16 + usize::from(bytes[12]), 0);
        theirs.read_exact(&mut bytes[16..]).unwrap();
        let request = Message::from_bytes(&bytes).unwrap();
        theirs.write_all(&answer(&request)).unwrap();
    });
    Client::new(mine)
}

/// After an answer that is none, nothing of the stream is believed.
#[test]
fn a_store_that_lies_is_not_believed_and_not_asked_again() {
    let lies: [fn(&Message) -> Vec<u8>; 7] = [
        // The answer to another request.
        |_| {
            Reply::Ok
                .encode(&Message::new(2, 77, 0, vec![]).unwrap())
                .unwrap()
                .to_bytes()
        },
        // Of another kind.
        |m| {
            Reply::Ok
                .encode(&Message::new(11, m.req_id(), 0, vec![]).unwrap())
                .unwrap()
                .to_bytes()
        },
        // An error without a name.
        |m| {
            Message::new(16, m.req_id(), 0, b"EHUH\0".to_vec())
                .unwrap()
                .to_bytes()
        },
        // An event that is none.
        |_| Message::new(15, 0, 0, b"no end".to_vec()).unwrap().to_bytes(),
        // A giant.
        |_| {
            [2_u32, 1, 0, u32::MAX]
                .into_iter()
                .flat_map(u32::to_le_bytes)
                .collect()
        },
        // Half a message.
        |m| {
            Message::new(2, m.req_id(), 0, b"value".to_vec())
                .unwrap()
                .to_bytes()[..18]
                .to_vec()
        },
        // Nothing.
        |_| Vec::new(),
    ];
    for lie in lies {
        let mut client = liar(lie);
        let error = client.read("/a").unwrap_err();
        assert!(error.errno().is_none(), "{error}");
        assert!(matches!(client.read("/a"), Err(Error::Closed)));
        assert!(matches!(client.next_event(None), Err(Error::Closed)));
    }
}

/// A message that comes in pieces over the deadline is not lost.
#[test]
fn a_deadline_amid_a_message_loses_nothing() {
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    let mut client = Client::new(mine);
    let store = thread::spawn(move || {
        let mut request = [0; 16 + 5]; // "/a" and "1", each with its NUL
        theirs.read_exact(&mut request).unwrap();
        let request = Message::from_bytes(&request).unwrap();
        theirs
            .write_all(&Reply::Ok.encode(&request).unwrap().to_bytes())
            .unwrap();
        theirs
    });
    client.watch("/a").unwrap();
    let mut theirs = store.join().unwrap();
    let event = Message::new(15, 0, 0, b"/a\x001\0".to_vec()).unwrap().to_bytes();
    let (start, end) = event.split_at(7);
    theirs.write_all(start).unwrap();
    assert_eq!(client.next_event(at_once()).unwrap(), None);
    theirs.write_all(end).unwrap();
    assert_eq!(
        client.next_event(Some(soon())).unwrap().unwrap().place.as_str(),
        "/a"
    );
}

/// XSA-349, seen from the reader: a store that floods costs bounded memory.
#[test]
fn a_flood_of_events_is_bounded_here_too() {
    let (server, mut client) = server();
    let mut other = server.connect().unwrap();
    client.watch("/a").unwrap();
    for i in 0..20_000 {
        other.mkdir(&format!("/a/{i}")).unwrap();
        if i % 100 == 0 {
            client.read("/").unwrap(); // takes in what has come
        }
    }
    let mut events = 0;
    while client.next_event(at_once()).unwrap().is_some() {
        events += 1;
    }
    assert!((1..10_000).contains(&events), "{events}");
}

#[test]
fn a_store_that_does_not_answer_is_given_up() {
    let (mine, _theirs) = UnixStream::pair().unwrap();
    let mut client = Client::new(mine);
    client.set_reply_timeout(Some(Duration::from_millis(20)));
    assert!(matches!(client.read("/a"), Err(Error::NoAnswer { .. })));
    assert!(matches!(client.read("/a"), Err(Error::Closed)));
}

#[test]
fn any_request_can_be_made() {
    let (_server, mut client) = server();
    let introduce = Request::Introduce {
        dom: DomId::new(9),
        gfn: 1,
        port: 2,
    };
    assert_eq!(client.request(&introduce).unwrap(), Reply::Ok);
    let known = Request::IsDomainIntroduced(DomId::new(9));
    assert_eq!(client.request(&known).unwrap(), Reply::Introduced(true));
}

#[test]
fn connecting_to_nothing_names_the_socket() {
    let error = Client::connect("/nonexistent/xenstore").unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot connect to the store at /nonexistent/xenstore"
    );
}
