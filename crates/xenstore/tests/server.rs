//! The server: what a connection may do to itself and not to others.
#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use gnttab_xenstore::client::{Client, Nodes as _};
use gnttab_xenstore::server::{Server, ServerError, ServerHandle};
use gnttab_xenstore::wire::{Kind, Message, Request};
use gnttab_xenstore::{DomId, Errno, Quotas};
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const D5: DomId = DomId::new(5);

/// A server, and a raw stream of domain 5.
fn with_guest() -> (ServerHandle, UnixStream) {
    let server = Server::new(Quotas::default()).spawn().unwrap();
    server.introduce_domain(D5).unwrap();
    let mut dom0 = server.connect().unwrap();
    dom0.mkdir("/local/domain/5").unwrap();
    dom0.set_perms("/local/domain/5", &"n5".parse().unwrap()).unwrap();
    let stream = raw(&server, D5);
    (server, stream)
}

fn raw(server: &ServerHandle, dom: DomId) -> UnixStream {
    let (mine, theirs) = UnixStream::pair().unwrap();
    server.add_connection(theirs, dom).unwrap();
    mine.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    mine
}

/// Whether the other end has been closed, after whatever it still had to say.
fn is_closed(stream: &mut UnixStream) -> bool {
    let mut bytes = [0; 65536];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return true,
            Err(_) => return false,
        }
    }
}

fn works(server: &ServerHandle) -> bool {
    let mut client = server.connect().unwrap();
    client.write("/works", "yes").is_ok() && client.read("/works").unwrap() == b"yes"
}

fn header(kind: u32, len: u32) -> Vec<u8> {
    [kind, 1, 0, len].into_iter().flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_giant_length_costs_the_connection_and_nobody_else_anything() {
    for len in [4097, 1 << 30, (1 << 31) - 1, 1 << 31, u32::MAX] {
        let (server, mut stream) = with_guest();
        let mut other = raw(&server, D5);
        stream.write_all(&header(Kind::Read.code(), len)).unwrap();
        assert!(is_closed(&mut stream));
        other
            .write_all(
                &Request::Read("/".parse().unwrap())
                    .encode(1, None)
                    .unwrap()
                    .to_bytes(),
            )
            .unwrap();
        let mut reply = [0; 16 + 7];
        other.read_exact(&mut reply).unwrap();
        assert!(reply.ends_with(b"EACCES\0"));
        assert!(works(&server));
    }
}

#[test]
fn half_messages_hold_up_nobody() {
    let (server, mut stream) = with_guest();
    let message = Message::new(Kind::Write.code(), 1, 0, b"x\0value".to_vec())
        .unwrap()
        .to_bytes();
    for cut in [1, 15, 16, 20] {
        let mut half = raw(&server, D5);
        half.write_all(&message[..cut]).unwrap();
        assert!(works(&server));
    }
    for byte in &message {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut reply = [0; 19];
    stream.read_exact(&mut reply).unwrap();
    assert!(reply.ends_with(b"OK\0"), "byte by byte is as good");
    assert_eq!(
        server.connect().unwrap().read("/local/domain/5/x").unwrap(),
        b"value"
    );
}

#[test]
fn unknown_types_are_answered() {
    let (_server, mut stream) = with_guest();
    for kind in [15, 16, 20, 99, u32::MAX] {
        stream.write_all(&header(kind, 0)).unwrap();
        let mut reply = [0; 16 + 7];
        stream.read_exact(&mut reply).unwrap();
        assert!(reply.ends_with(b"ENOSYS\0"));
    }
}

#[test]
fn many_requests_at_once_are_answered_in_order() {
    let (_server, mut stream) = with_guest();
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for id in 0..5000 {
            let request = Request::GetDomainPath(D5).encode(id, None).unwrap();
            writer.write_all(&request.to_bytes()).unwrap();
        }
    });
    for id in 0..5000 {
        let mut reply = [0; 16 + 16];
        stream.read_exact(&mut reply).unwrap();
        let reply = Message::from_bytes(&reply).unwrap();
        assert_eq!(
            (reply.req_id(), reply.payload()),
            (id, b"/local/domain/5\0".as_slice())
        );
    }
    sender.join().unwrap();
}

/// Who sends requests and does not read the answers is not read from any more.
#[test]
fn who_does_not_read_its_answers_is_kept_waiting() {
    let (server, mut stream) = with_guest();
    stream.set_nonblocking(true).unwrap();
    let request = Request::GetDomainPath(D5).encode(1, None).unwrap().to_bytes();
    let mut sent = 0_usize;
    let stuck = loop {
        match stream.write(&request) {
            Ok(n) => sent += n,
            Err(error) => break error,
        }
        assert!(sent < 64 << 20, "the server takes without end");
        if sent % (1 << 20) < request.len() {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    assert_eq!(stuck.kind(), ErrorKind::WouldBlock);
    assert!(works(&server));

    // Once it reads, it is served on.
    stream.set_nonblocking(false).unwrap();
    let whole = sent / request.len();
    let mut replies = vec![0; whole * 32];
    stream.read_exact(&mut replies).unwrap();
    assert!(replies.ends_with(b"/local/domain/5\0"));
}

/// Nor do its events pile up: they wait merged, and it learns of the change.
#[test]
fn who_does_not_read_its_events_is_told_the_rest_at_once() {
    let (server, mut stream) = with_guest();
    let mut dom0 = server.connect().unwrap();
    dom0.set_perms("/local/domain/5", &"n5".parse().unwrap()).unwrap();
    let watch = Message::new(Kind::Watch.code(), 1, 0, b"data\0t\0".to_vec()).unwrap();
    stream.write_all(&watch.to_bytes()).unwrap();
    let long = "x".repeat(900);
    for i in 0..2000 {
        dom0.mkdir(&format!("/local/domain/5/data/{long}-{i}")).unwrap();
    }
    drop(dom0);
    stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut all = Vec::new();
    let error = stream.read_to_end(&mut all).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "it was not closed");
    let whole = all.windows(7).filter(|at| at == b"data\0t\0").count();
    assert!(
        whole >= 2,
        "the first event, and one for what was merged: {whole} in {}",
        all.len()
    );
    assert!(all.len() < 2000 * 900, "{}", all.len());
}

#[test]
fn a_flooding_domain_does_not_starve_others() {
    let (server, mut stream) = with_guest();
    let mut writer = stream.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        let request = Message::new(Kind::Write.code(), 1, 0, b"x\0y".to_vec())
            .unwrap()
            .to_bytes();
        let many = request.repeat(1000);
        while writer.write_all(&many).is_ok() {}
    });
    let drain = std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        while matches!(stream.read(&mut bytes), Ok(n) if n > 0) {}
    });
    for _ in 0..100 {
        assert!(works(&server));
    }
    server.release_domain(D5).unwrap();
    flood.join().unwrap();
    drain.join().unwrap();
}

/// A domain that writes without pause what the toolstack reads in a
/// transaction cannot keep it from committing.
#[test]
fn a_flood_of_writes_does_not_starve_a_transaction() {
    let (server, stream) = with_guest();
    let mut guest = Client::new(stream);
    let flood = std::thread::spawn(move || {
        let mut writes = 0_u64;
        while guest.write("state", writes.to_string()).is_ok() {
            writes += 1;
        }
        writes
    });
    let mut dom0 = server.connect().unwrap();
    for _ in 0..20 {
        let mut runs = 0;
        dom0.transaction(|tx| {
            runs += 1;
            let state = tx.read_if_there("/local/domain/5/state")?.unwrap_or_default();
            for i in 0..20 {
                tx.write(&format!("/seen/{i}"), &state)?;
            }
            Ok(())
        })
        .unwrap();
        assert!(runs <= 10, "{runs}");
    }
    server.release_domain(D5).unwrap();
    assert!(flood.join().unwrap() > 100, "it was slowed, not stopped");
}

/// The other way round, a domain makes nobody of the control domain wait.
#[test]
fn a_domain_cannot_hold_the_toolstack_back() {
    let (server, stream) = with_guest();
    let mut guest = Client::new(stream);
    let losing = std::thread::spawn(move || {
        // Its transactions lose to every write of the toolstack.
        while !matches!(
            guest.transaction(|tx| {
                tx.read("name")?;
                tx.write("seen", "")
            }),
            Err(gnttab_xenstore::client::Error::Closed | gnttab_xenstore::client::Error::Io(_))
        ) {}
    });
    let mut dom0 = server.connect().unwrap();
    let start = std::time::Instant::now();
    for i in 0..2000 {
        dom0.write("/local/domain/5/name", i.to_string()).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    server.release_domain(D5).unwrap();
    losing.join().unwrap();
}

#[test]
fn release_closes_the_domains_connections_and_no_others() {
    let (server, mut stream) = with_guest();
    let mut second = raw(&server, D5);
    server.introduce_domain(DomId::new(6)).unwrap();
    let mut six = server.connect_domain(DomId::new(6)).unwrap();
    server.release_domain(D5).unwrap();
    assert!(is_closed(&mut stream) && is_closed(&mut second));
    six.domain_path(D5).unwrap();
    assert!(matches!(
        server.add_connection(UnixStream::pair().unwrap().0, D5),
        Err(ServerError::Domain {
            dom: D5,
            errno: Errno::ENOENT
        })
    ));
    assert!(server.release_domain(D5).is_err());
    assert!(server.introduce_domain(DomId::FIRST_RESERVED).is_err());
}

#[test]
fn a_release_by_message_closes_connections_too() {
    let (server, mut stream) = with_guest();
    let mut dom0 = server.connect().unwrap();
    dom0.request(&Request::Release(D5)).unwrap();
    assert!(is_closed(&mut stream));
    assert!(works(&server));
}

#[test]
fn who_a_connection_is_hangs_on_its_descriptor() {
    let (server, _) = with_guest();
    server.connect().unwrap().write("/secret", "v").unwrap();
    let mut five = server.connect_domain(D5).unwrap();
    assert_eq!(five.read("/secret").unwrap_err().errno(), Some(Errno::EACCES));
    let release = five.request(&Request::Release(DomId::new(6)));
    assert_eq!(release.unwrap_err().errno(), Some(Errno::EACCES));
}

#[test]
fn stopping_closes_everything() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let server = Server::new(Quotas::default())
        .listen(&socket)
        .unwrap()
        .spawn()
        .unwrap();
    let mut client = Client::connect(&socket).unwrap();
    client.write("/a", "").unwrap();
    let mut stream = raw(&server, DomId::DOM0);
    server.stop();
    assert!(is_closed(&mut stream));
    assert!(client.read("/a").is_err());
    assert!(!socket.exists());
}

#[test]
fn the_socket_is_its_owners_alone() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _server = Server::new(Quotas::default())
        .listen(&socket)
        .unwrap()
        .spawn()
        .unwrap();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_dead_socket_is_replaced_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let server = Server::new(Quotas::default())
        .listen(&socket)
        .unwrap()
        .spawn()
        .unwrap();
    let second = Server::new(Quotas::default()).listen(&socket);
    assert!(matches!(second, Err(ServerError::InUse { .. })));
    Client::connect(&socket).unwrap().write("/a", "").unwrap();
    drop(server);

    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = Server::new(Quotas::default()).listen(&file).unwrap_err();
    assert!(matches!(error, ServerError::Listen { .. }), "{error}");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    let nowhere = dir.path().join("none/socket");
    assert!(matches!(
        Server::new(Quotas::default()).listen(nowhere),
        Err(ServerError::Listen { .. })
    ));
}

/// Connections come and go, orderly and not, and no descriptor stays.
#[test]
fn a_thousand_connections_leave_nothing() {
    let (server, stream) = with_guest();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mut client = server.connect().unwrap();
    let mut most = 0;
    for round in 0..1000 {
        let mut stream = raw(&server, D5);
        if round % 2 == 0 {
            stream.write_all(&header(2, 100)).unwrap();
        }
        drop(stream);
        client.read("/").unwrap();
        most = most.max(descriptors());
    }
    drop(stream);
    // Other tests of this process have descriptors too; a leak would be hundreds.
    assert!(most < 500, "{most}");
}
