//! What the ring and the block drivers cost, both ends on one processor and on two.
//!
//! `cargo bench -p gnttab-io --features fake`. Grants, maps and the disk are the in-memory ones: what is measured is
//! this crate, plus one copy into or out of a page of the frontend, and one of the RAM disk.

use std::hint::black_box;
use std::time::{Duration, Instant};

use gnttab_abi::Abi;
use gnttab_io::blkif::{BackendQueue, Completion, Io, OneShot};
use gnttab_io::fake::{FakeGrantee, RamDisk, Rig, RigConfig};
use gnttab_io::ring::{BackRing, FrontRing};
use gnttab_io::shared::HeapPages;

const RUN: Duration = Duration::from_millis(400);

fn main() {
    println!("{:<44} {:>10} {:>12}", "", "ns each", "MiB/s");
    ring();
    for persistent in [true, false] {
        for one_shot in if persistent {
            &[OneShot::Map][..]
        } else {
            &[OneShot::Map, OneShot::Copy]
        } {
            let config = RigConfig {
                persistent,
                one_shot: *one_shot,
                ring_order: 2,
                ..RigConfig::default()
            };
            let name = match (persistent, one_shot) {
                (true, _) => "persistent",
                (_, OneShot::Map) => "mapped",
                (_, OneShot::Copy) => "copied",
            };
            one_thread(&format!("{name}, 4 KiB reads"), config, 4096, false);
            one_thread(&format!("{name}, 4 KiB writes"), config, 4096, true);
            one_thread(&format!("{name}, 128 KiB reads"), config, 128 << 10, false);
            one_thread(&format!("{name}, 128 KiB writes"), config, 128 << 10, true);
        }
    }
    for (bytes, name) in [(4096, "4 KiB"), (128 << 10, "128 KiB")] {
        two_threads(&format!("two threads, persistent, {name} reads"), bytes, false);
        two_threads(&format!("two threads, persistent, {name} writes"), bytes, true);
    }
}

fn report(name: &str, operations: u64, bytes: usize, elapsed: Duration) {
    let nanoseconds = elapsed.as_secs_f64() * 1e9 / operations as f64;
    let rate = operations as f64 * bytes as f64 / elapsed.as_secs_f64() / f64::from(1 << 20);
    println!("{name:<44} {nanoseconds:>10.0} {rate:>12.0}");
}

/// One request and its response through the bare ring, sixteen at a time.
fn ring() {
    let heap = HeapPages::zeroed(1);
    let mut front = FrontRing::init(heap.view(), 112).expect("a ring");
    let mut back = BackRing::attach(heap.view(), 112).expect("a ring");
    let mut slot = [0; 112];
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < RUN {
        for _ in 0..1000 {
            for _ in 0..16 {
                front.push(&slot).expect("room");
            }
            black_box(front.publish());
            while let Ok(Some(owed)) = back.take(&mut slot) {
                back.respond(owed, &slot[..16]);
            }
            black_box(back.publish());
            while let Ok(true) = front.take(&mut slot) {}
        }
        rounds += 16_000;
    }
    report("bare ring, request and response", rounds, 0, start.elapsed());
}

const DISK_SECTORS: usize = 16 << 11;
const DEPTH: usize = 32;

/// The operations of a run: each completion is submitted again at the next place.
struct Load {
    bytes: usize,
    sector: u64,
    done: u64,
}

impl Load {
    fn start(rig: &mut Rig, bytes: usize, write: bool) -> Load {
        let mut load = Load {
            bytes,
            sector: 0,
            done: 0,
        };
        for token in 0..DEPTH as u64 {
            let (sector, data) = (load.next_sector(), vec![7; bytes].into());
            let io = if write {
                Io::Write { sector, data }
            } else {
                Io::Read { sector, data }
            };
            rig.device.submit(token, io).expect("a legal operation");
        }
        rig.device.kick();
        load
    }

    fn next_sector(&mut self) -> u64 {
        self.sector = (self.sector + self.bytes as u64 / 512) % (DISK_SECTORS as u64 / 2);
        self.sector
    }

    fn again(&mut self, mut completion: Completion) -> (u64, Io) {
        completion.result.expect("success");
        self.done += 1;
        let next = self.next_sector();
        if let Io::Read { sector, .. } | Io::Write { sector, .. } = &mut completion.io {
            *sector = next;
        }
        (completion.token, completion.io)
    }
}

fn one_thread(name: &str, config: RigConfig, bytes: usize, write: bool) {
    let mut rig = Rig::new(config, DISK_SECTORS);
    let mut load = Load::start(&mut rig, bytes, write);
    let start = Instant::now();
    while start.elapsed() < RUN {
        rig.serve();
        while let Some(completion) = rig.device.poll().expect("an honest backend") {
            let (token, io) = load.again(completion);
            rig.device.submit(token, io).expect("a legal operation");
        }
    }
    report(name, load.done, bytes, start.elapsed());
}

/// The backend on a thread of its own; both spin a little before they sleep.
fn two_threads(name: &str, bytes: usize, write: bool) {
    let config = RigConfig {
        ring_order: 2,
        abi: Abi::X86_64,
        ..RigConfig::default()
    };
    let mut rig = Rig::new(config, DISK_SECTORS);
    let mut queue = rig.backend.remove(0);
    let disk = std::mem::replace(&mut rig.disk, RamDisk::new(0));
    let (mut event, to_backend) = (rig.to_frontend[0].clone(), rig.to_backend[0].clone());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut load = Load::start(&mut rig, bytes, write);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                if !serve(&mut queue, &disk, &mut event) {
                    to_backend.wait(Duration::from_millis(20));
                }
            }
        });
        let from_backend = rig.to_frontend[0].clone();
        while start.elapsed() < RUN {
            let mut idle = true;
            while let Some(completion) = rig.device.poll().expect("an honest backend") {
                let (token, io) = load.again(completion);
                rig.device.submit(token, io).expect("a legal operation");
                idle = false;
            }
            if idle {
                from_backend.wait(Duration::from_millis(20));
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    report(name, load.done, bytes, start.elapsed());
    let stats = queue.stats();
    let per = |count: u64| count as f64 / load.done as f64;
    let front = rig.device.queues()[0].stats().notifications;
    println!(
        "{:<44} {:>10.2} {:>12.2}",
        "  events to frontend, to backend, each",
        per(stats.notifications),
        per(front)
    );
}

fn serve(queue: &mut BackendQueue<FakeGrantee>, disk: &RamDisk, event: &mut gnttab_io::fake::Event) -> bool {
    let mut worked = false;
    for _ in 0..64 {
        worked |= queue.process(disk, event, 64).expect("an honest frontend").served > 0;
        std::hint::spin_loop();
    }
    worked
}
