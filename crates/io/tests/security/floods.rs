//! Catalogue 11.5: what a peer can make us use up.

use std::sync::atomic::{AtomicUsize, Ordering};

use gnttab_abi::Abi;
use gnttab_io::blkif::{BackendConfig, Disk, DiskError, DiskInfo, OneShot, RawSegment};
use gnttab_io::fake::{FakeDomain, NullPort, Rig, RigConfig};
use gnttab_io::shared::{SharedSlice, SharedSliceMut};
use gnttab_io::throttle::EventThrottle;

use crate::rig::{SECTORS, Served, direct, indirect, part, read, write};

/// A peer that sends events as fast as it can, with no work behind them, costs a look at the ring now and then; and work that
/// comes amid the flood is served within the longest pause.
#[test]
fn xsa_332_a_flood_of_events_costs_little_and_hides_no_work() {
    let abi = Abi::X86_64;
    let mut served = Served::new(BackendConfig::new(abi, true));
    let (gref, _page) = served.page();
    let mut throttle = EventThrottle::default();
    // Milliseconds; in each of them events come.
    let (mut now, mut looks, mut sent_at, mut worst) = (0, 0, None, 0);
    while now < 600_000 {
        let progress = served.queue.process(&served.disk, &mut NullPort, 8).unwrap();
        looks += 1;
        if progress.served > 0 {
            worst = worst.max(now - sent_at.take().expect("a request was sent"));
        }
        let pause = throttle.after(progress.served > 0).max(1);
        // Once in a minute there is work, and it comes as a pause begins.
        if sent_at.is_none() && now / 60_000 != (now + pause) / 60_000 {
            served.liar.send(&direct(abi, 0, 0, &[part(gref, 0, 7)]));
            sent_at = Some(now);
        }
        now += pause;
    }
    assert!(
        worst > 0 && worst <= 1000,
        "{worst} ms until a request was served"
    );
    assert!(looks < 10 * 75, "{looks} looks in ten minutes");
}

/// A disk that looks how much is mapped while it works, which is when most is.
struct Watching {
    domain: FakeDomain,
    most: AtomicUsize,
}

impl Disk for Watching {
    fn info(&self) -> DiskInfo {
        DiskInfo::new(SECTORS)
    }

    fn read(&self, _: u64, _: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        self.most.fetch_max(self.domain.mappings(), Ordering::SeqCst);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64, _: bool) -> Result<(), DiskError> {
        Ok(())
    }
}

/// What one frontend can have mapped at a time is known beforehand, whatever it asks, so that one takes no other's share of
/// the backend's addresses.
#[test]
fn xsa_300_a_queue_maps_no_more_than_its_share() {
    for one_shot in [OneShot::Map, OneShot::Copy] {
        let config = BackendConfig {
            one_shot,
            max_indirect: 600,
            persistent_limit: 100,
            ..BackendConfig::new(Abi::X86_64, true)
        };
        // The ring, what is kept, and one request with the pages of its segments.
        let share = 1 + 100 + 600 + 2;
        let mut served = Served::new(config);
        let grefs: Vec<_> = (0..2000).map(|_| served.page().0).collect();
        let disk = Watching {
            domain: served.domain.clone(),
            most: AtomicUsize::new(0),
        };
        for some in grefs.chunks(600) {
            let parts: Vec<RawSegment> = some.iter().map(|gref| part(*gref, 0, 0)).collect();
            let slot = indirect(&served, 1, 0, &parts);
            served.liar.send(&slot);
            assert_eq!(served.queue.process(&disk, &mut NullPort, 1).unwrap().served, 1);
        }
        assert_eq!(
            served.queue.stats().writes,
            4,
            "{:?}",
            served.queue.last_failure()
        );
        let most = disk.most.load(Ordering::SeqCst);
        assert!((100..=share).contains(&most), "{most} mappings");
        assert_eq!(served.queue.persistent_mappings(), 100);
    }
}

/// Every page that traffic takes comes back to the pool, on the good paths and the bad ones.
#[test]
fn xsa_457_the_pool_is_as_large_after_a_hundred_thousand_requests() {
    let mut rig = Rig::new(
        RigConfig {
            persistent: false,
            ..RigConfig::default()
        },
        256,
    );
    let mut after_a_while = None;
    for round in 0..100_000u64 {
        // Some reach past the end of a disk that has shrunk in the backend's eyes.
        if round % 7 == 0 {
            rig.backend[0].set_disk(DiskInfo::new(round % 3 * 128));
        }
        let io = if round % 2 == 0 {
            read(round % 100, 100)
        } else {
            write(round % 100, 60, 9)
        };
        rig.device.submit(round, io).unwrap();
        rig.device.kick();
        rig.serve();
        assert!(rig.device.poll().unwrap().is_some());
        assert_eq!(rig.device.poll().unwrap(), None);
        if round == 1000 {
            after_a_while = Some((rig.domain.pages(), rig.device.queues()[0].pool_pages()));
        }
    }
    assert_eq!(
        after_a_while,
        Some((rig.domain.pages(), rig.device.queues()[0].pool_pages()))
    );
    assert!(
        rig.device.queues()[0].stats().failures > 1000,
        "the bad paths were taken too"
    );
    let domain = rig.domain.clone();
    drop(rig);
    assert_eq!((domain.pages(), domain.grants(), domain.mappings()), (0, 0, 0));
}
