//! `kill -9` of each process in mid-write: what was acknowledged before a flush is in the image.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::client::{Client, pattern};
use super::schema;
use super::served::{Served, kill};

const SIZE: u64 = 16 << 20;
const BLOCK: u64 = 64 << 10;

/// Writes round after round until the connection breaks or `stop`; what every place must hold: the last content whose write
/// was acknowledged before a flush, or one that was written later.
fn write_until_it_breaks(
    mut client: Client,
    rounds: &AtomicU64,
    stop: &AtomicBool,
) -> BTreeMap<u64, Vec<u64>> {
    // By place: the flushed seed, then all seeds sent since.
    let mut possible: BTreeMap<u64, Vec<u64>> = (0..SIZE / BLOCK).map(|n| (n * BLOCK, vec![0])).collect();
    for round in 1.. {
        let seed = |offset: u64| round * 1000 + offset / BLOCK;
        let writes: Vec<(u64, Vec<u8>)> = (0..16)
            .map(|n| (round * 7 + n) % (SIZE / BLOCK) * BLOCK)
            .map(|offset| (offset, pattern(seed(offset), 64 << 10)))
            .collect();
        for (offset, _) in &writes {
            possible.entry(*offset).or_default().push(seed(*offset));
        }
        let (acknowledged, outcome) = client.write_all(&writes);
        if outcome.is_err() || client.flush().is_err() {
            return possible;
        }
        for offset in acknowledged {
            possible.insert(offset, vec![seed(offset)]);
        }
        rounds.store(round, Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) {
            return possible;
        }
    }
    possible
}

fn check(image: &[u8], possible: &BTreeMap<u64, Vec<u64>>) {
    let mut flushed = 0;
    for (offset, seeds) in possible {
        let content = &image[usize::try_from(*offset).unwrap()..][..64 << 10];
        // Seed 0 is the image as it was: not touched by anything that was flushed. A write that was under way when the
        // process died may have been done in part, so a place with several seeds must hold only pages of those.
        let contents: Vec<Vec<u8>> = seeds
            .iter()
            .map(|seed| {
                if *seed == 0 {
                    vec![0; 64 << 10]
                } else {
                    pattern(*seed, 64 << 10)
                }
            })
            .collect();
        for at in (0..64 << 10).step_by(512) {
            let sector = &content[at..at + 512];
            assert!(
                contents.iter().any(|content| content[at..at + 512] == *sector),
                "lost: {offset:#x}+{at:#x}"
            );
        }
        flushed += usize::from(seeds.len() == 1 && seeds[0] != 0);
    }
    assert!(
        flushed > 16,
        "the test wrote too little to say anything: {flushed}"
    );
}

fn kill_in_mid_write(victim: impl FnOnce(&Served) -> i32) -> (Served, BTreeMap<u64, Vec<u64>>) {
    let served = Served::new(&[], |path| {
        std::fs::File::create(path).unwrap().set_len(SIZE).unwrap();
    });
    let client = Client::connect(&served.socket()).unwrap();
    let (rounds, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let possible = thread::scope(|scope| {
        let writer = scope.spawn(|| write_until_it_breaks(client, &rounds, &stop));
        while rounds.load(Ordering::Relaxed) < 20 {
            assert!(!writer.is_finished(), "it broke before anything was killed");
            thread::sleep(Duration::from_millis(1));
        }
        kill(victim(&served), "KILL");
        thread::sleep(Duration::from_millis(600));
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    (served, possible)
}

#[test]
fn killing_the_backend_loses_nothing_and_another_takes_over() {
    let (mut served, possible) = kill_in_mid_write(|served| served.pid("backend"));
    let event = served.event();
    assert_eq!(event["event"], "restarted", "{event}");
    check(&std::fs::read(served.image()).unwrap(), &possible);
    // The client that was connected all the time saw no error, and a new one is served as well.
    let mut client = Client::connect(&served.socket()).unwrap();
    let (acknowledged, _) = client.write_all(&[(0, pattern(9, 4096))]);
    assert_eq!(acknowledged, [0]);
    assert!(client.read(0, 4096).unwrap() == pattern(9, 4096));
    let (status, stopped) = served.stop();
    assert!(status.success());
    assert_eq!(stopped["totals"]["errors"], 0);
}

#[test]
fn killing_the_frontend_loses_nothing_and_another_takes_over() {
    let (mut served, possible) = kill_in_mid_write(|served| served.pid("frontend"));
    check(&std::fs::read(served.image()).unwrap(), &possible);
    let event = served.event();
    assert_eq!(event["event"], "restarted", "{event}");
    let mut client = Client::connect(&served.socket()).unwrap();
    client.read(0, 4096).unwrap();
    assert!(served.stop().0.success());
}

/// The frontend's pages stay in use until its backend has noticed.
#[test]
fn a_backend_that_lets_go_late_is_waited_for() {
    let mut served = Served::patterned(&[], 1 << 20);
    let mut client = Client::connect(&served.socket()).unwrap();
    assert!(client.read(0, 4096).unwrap() == pattern(7, 4096));
    kill(served.pid("backend"), "STOP");
    kill(served.pid("frontend"), "KILL");
    thread::sleep(Duration::from_millis(1200));
    kill(served.pid("backend"), "CONT");
    let event = served.event();
    assert_eq!(event["event"], "restarted", "{event}");
    let mut client = Client::connect(&served.socket()).unwrap();
    assert!(client.read(0, 4096).unwrap() == pattern(7, 4096));
    drop(client);
    assert!(served.stop().0.success());
}

/// Each order, and gaps within which the first death may or may not have been noticed when the second comes.
#[test]
fn killing_both_domains_replaces_both() {
    for names in [["backend", "frontend"], ["frontend", "backend"]] {
        for gap in [0, 100] {
            let mut served = Served::patterned(&[], 1 << 20);
            kill(served.pid(names[0]), "KILL");
            thread::sleep(Duration::from_millis(gap));
            kill(served.pid(names[1]), "KILL");
            let mut replaced = [served.event(), served.event()].map(|event| {
                assert_eq!(event["event"], "restarted", "{event}");
                event["domain"].as_str().unwrap().to_owned()
            });
            replaced.sort();
            assert_eq!(replaced, ["backend", "frontend"]);
            let mut client = Client::connect(&served.socket()).unwrap();
            assert!(client.read(0, 4096).unwrap() == pattern(7, 4096));
            let (acknowledged, _) = client.write_all(&[(4096, pattern(9, 4096))]);
            assert_eq!(acknowledged, [4096]);
            drop(client);
            assert!(served.stop().0.success());
        }
    }
}

#[test]
fn killing_the_monitor_loses_nothing_and_ends_every_domain() {
    let (mut served, possible) = kill_in_mid_write(Served::monitor);
    served.wait();
    check(&std::fs::read(served.image()).unwrap(), &possible);
    for name in ["backend", "frontend"] {
        let process = format!("/proc/{}", served.pid(name));
        for _ in 0..200 {
            if !std::path::Path::new(&process).exists() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!std::path::Path::new(&process).exists(), "{name} is left");
    }
}

/// Who is stopped is said to be, and a machine all of whose domains are stopped still ends in order.
#[test]
fn domains_that_a_signal_has_stopped_are_named_and_end_in_order() {
    let served = Served::patterned(&[], 1 << 20);
    for domain in ["backend", "frontend"] {
        kill(served.pid(domain), "STOP");
    }
    let doctor = std::process::Command::new(env!("CARGO_BIN_EXE_gnttab"))
        .env("XDG_RUNTIME_DIR", served.folder.path())
        .args(["doctor", "--json", "--interval", "0.1"])
        .output()
        .unwrap();
    let report = schema::line(String::from_utf8(doctor.stdout).unwrap().trim());
    let stopped: Vec<&str> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["kind"] == "stopped")
        .filter_map(|finding| finding["name"].as_str())
        .collect();
    assert_eq!(stopped, ["backend", "frontend"], "{report}");
    let (status, said) = served.stop();
    assert!(status.success(), "{said}");
}
