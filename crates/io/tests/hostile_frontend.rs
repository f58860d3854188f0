//! The backend against frontends that lie. Each test names the rule (PVR-n) or the advisory's test (T-n) it holds.

#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use gnttab_abi::{Abi, GrantRef, GrantStatus};
use gnttab_io::blkif::{
    BackendConfig, BackendQueue, BadRequest, DiscardInfo, Disk, DiskError, DiskInfo, Failure, OneShot,
    RawResponse, RawSegment, Slot, response_size, slot_size,
};
use gnttab_io::fake::{Call, FakeDomain, FakeGrantee, FaultPoint, HostileFrontend, NullPort, RamDisk};
use gnttab_io::grants::Access;
use gnttab_io::shared::{HeapPages, Observer, SharedPages, SharedSlice, SharedSliceMut};
use proptest::prelude::*;

struct Victim {
    domain: FakeDomain,
    disk: RamDisk,
    liar: HostileFrontend,
    queue: BackendQueue<FakeGrantee>,
    sent: u32,
}

impl Victim {
    fn new(config: BackendConfig) -> Victim {
        Victim::with(FakeDomain::new(), RamDisk::new(64), config)
    }

    fn with(domain: FakeDomain, disk: RamDisk, config: BackendConfig) -> Victim {
        let liar = HostileFrontend::new(&domain, config.abi, 1).unwrap();
        let queue = BackendQueue::connect(domain.grantee(), liar.ring(), config, disk.info()).unwrap();
        Victim {
            domain,
            disk,
            liar,
            queue,
            sent: 0,
        }
    }

    fn page(&self) -> (GrantRef, SharedPages) {
        self.liar.data_page(Access::ReadWrite).unwrap()
    }

    /// Sends one request and gives its answer: every request gets one, and only one.
    fn ask(&mut self, slot: &Slot) -> RawResponse {
        self.liar.send(slot);
        let progress = self.queue.process(&self.disk, &mut NullPort, 8).unwrap();
        assert_eq!(progress.served, 1);
        self.sent += 1;
        assert_eq!(self.liar.rsp_prod(), self.sent);
        let response = self.liar.response(self.sent - 1);
        assert_eq!(response.id, slot.id(), "bit for bit");
        response
    }
}

fn configs() -> Vec<BackendConfig> {
    let mut configs = Vec::new();
    for abi in Abi::ALL {
        for (persistent, one_shot) in [
            (true, OneShot::Map),
            (false, OneShot::Map),
            (false, OneShot::Copy),
            (true, OneShot::Copy),
        ] {
            configs.push(BackendConfig {
                one_shot,
                ..BackendConfig::new(abi, persistent)
            });
        }
    }
    configs
}

/// Whether every byte of a page is this one.
fn holds(page: &SharedPages, byte: u8) -> bool {
    let mut content = [0; 4096];
    page.read(0, &mut content);
    content.iter().all(|found| *found == byte)
}

fn request(abi: Abi, operation: u8, sector: u64, segments: &[(GrantRef, u8, u8)]) -> Slot {
    let mut slot = Slot::new(abi);
    slot.set_operation(operation);
    slot.set_second(u8::try_from(segments.len()).unwrap());
    slot.set_id(0xFEDC_BA98_7654_3210);
    slot.set_sector_number(sector);
    for (i, (gref, first_sect, last_sect)) in segments.iter().enumerate() {
        let (first_sect, last_sect) = (*first_sect, *last_sect);
        slot.set_segment(
            i,
            RawSegment {
                gref: *gref,
                first_sect,
                last_sect,
            },
        );
    }
    slot
}

/// An indirect request of `count` segments, all of one page, in one page of segments.
fn indirect(victim: &Victim, inner: u8, count: u16, segment: RawSegment) -> (Slot, SharedPages) {
    let (gref, page) = victim.page();
    for i in 0..usize::from(count) {
        page.write(i * 8, &segment.to_bytes());
    }
    let mut slot = Slot::new(victim.liar.abi());
    slot.set_operation(6);
    slot.set_second(inner);
    slot.set_half(count);
    slot.set_id(0x0123_4567_89AB_CDEF);
    slot.set_indirect_page(0, gref);
    (slot, page)
}

fn assert_status(victim: &mut Victim, slot: &Slot, status: i16) {
    let response = victim.ask(slot);
    assert_eq!(
        response.status,
        status,
        "{slot:?}: {:?}",
        victim.queue.last_failure()
    );
    assert_eq!(
        response.operation,
        if slot.operation() == 6 {
            slot.second()
        } else {
            slot.operation()
        }
    );
}

#[test]
fn pvr5_every_check_of_the_table_is_made_and_the_device_lives_on() {
    for config in configs() {
        let mut victim = Victim::new(config);
        let abi = config.abi;
        let (gref, page) = victim.page();
        let good = |operation| request(abi, operation, 8, &[(gref, 0, 7)]);
        let refused: Vec<(Slot, i16)> = vec![
            (request(abi, 4, 0, &[(gref, 0, 7)]), -2),
            (request(abi, 255, 0, &[]), -2),
            (request(abi, 0, 0, &[]), -1),
            (request(abi, 1, 0, &[]), -1),
            (request(abi, 0, 0, &[(gref, 3, 2)]), -1),
            (request(abi, 0, 0, &[(gref, 0, 8)]), -1),
            (request(abi, 0, 0, &[(gref, 0, 255)]), -1),
            (request(abi, 0, 64, &[(gref, 0, 0)]), -1),
            (request(abi, 0, 57, &[(gref, 0, 7)]), -1),
            (request(abi, 1, u64::MAX, &[(gref, 0, 0)]), -1),
            (request(abi, 1, u64::MAX - 7, &[(gref, 0, 7)]), -1),
            (request(abi, 0, 0, &[(GrantRef(u32::MAX), 0, 7)]), -1),
            (request(abi, 0, 0, &[(gref, 0, 7), (GrantRef(3), 0, 7)]), -1),
            // No discard here.
            (request(abi, 5, 0, &[]), -2),
            // An indirect request without segments, and one of an inner operation that there is none of.
            (request(abi, 6, 0, &[]), -1),
            (
                indirect(
                    &victim,
                    3,
                    1,
                    RawSegment {
                        gref,
                        first_sect: 0,
                        last_sect: 7,
                    },
                )
                .0,
                -1,
            ),
            (
                indirect(
                    &victim,
                    0,
                    257,
                    RawSegment {
                        gref,
                        first_sect: 0,
                        last_sect: 0,
                    },
                )
                .0,
                -1,
            ),
            (
                indirect(
                    &victim,
                    0,
                    5,
                    RawSegment {
                        gref,
                        first_sect: 0,
                        last_sect: 8,
                    },
                )
                .0,
                -1,
            ),
            (
                indirect(
                    &victim,
                    1,
                    40,
                    RawSegment {
                        gref,
                        first_sect: 0,
                        last_sect: 7,
                    },
                )
                .0,
                -1,
            ),
        ];
        for (slot, status) in refused {
            assert_status(&mut victim, &slot, status);
            // A read whose pages are copied to fails after the disk was read, which harms nobody.
            let calls = victim.disk.calls();
            assert!(
                calls.iter().all(|call| matches!(call, Call::Read(0, _))),
                "{slot:?} led to {calls:?}"
            );
        }
        let mut many = request(abi, 1, 0, &[(gref, 0, 7)]);
        many.set_second(12);
        assert_status(&mut victim, &many, -1);
        page.write(0, &[0x5A; 4096]);
        assert_status(&mut victim, &good(1), 0);
        page.zero();
        assert_status(&mut victim, &good(0), 0);
        assert!(holds(&page, 0x5A));
        assert_eq!(victim.disk.calls(), [Call::Write(8, 4096), Call::Read(8, 4096)]);
        let (slot, _page) = indirect(
            &victim,
            1,
            8,
            RawSegment {
                gref,
                first_sect: 0,
                last_sect: 7,
            },
        );
        assert_status(&mut victim, &slot, 0);
    }
}

#[test]
fn partial_pages_touch_their_sectors_only() {
    for config in configs() {
        let mut victim = Victim::new(config);
        let (gref, page) = victim.page();
        page.write(0, &[0xAA; 4096]);
        assert_status(&mut victim, &request(config.abi, 0, 0, &[(gref, 2, 4)]), 0);
        let mut content = [0; 4096];
        page.read(0, &mut content);
        assert!(content[2 * 512..5 * 512].iter().all(|byte| *byte == 0));
        assert!(
            content[..2 * 512]
                .iter()
                .chain(&content[5 * 512..])
                .all(|byte| *byte == 0xAA)
        );
    }
}

#[test]
fn semantics_of_barriers_flushes_and_discards() {
    let info = DiskInfo {
        discard: Some(DiscardInfo {
            granularity: 512,
            alignment: 0,
            secure: false,
        }),
        ..DiskInfo::new(64)
    };
    let abi = Abi::X86_64;
    let disk = RamDisk::with_info(info, vec![1; 64 * 512]);
    let mut victim = Victim::with(FakeDomain::new(), disk, BackendConfig::new(abi, true));
    let (gref, _page) = victim.page();
    let data = [(gref, 0u8, 7u8)];
    for (operation, segments, expected) in [
        (3, &data[..0], vec![Call::Flush]),
        (3, &data[..], vec![Call::Write(0, 4096), Call::Flush]),
        (2, &data[..0], vec![Call::Flush]),
        (2, &data[..], vec![Call::Flush, Call::Write(0, 4096), Call::Flush]),
    ] {
        assert_status(&mut victim, &request(abi, operation, 0, segments), 0);
        assert_eq!(victim.disk.calls(), expected);
    }
    let mut discard = request(abi, 5, 10, &[]);
    discard.set_nr_sectors(54);
    assert_status(&mut victim, &discard, 0);
    discard.set_second(1);
    assert_status(&mut victim, &discard, 0);
    let calls = [Call::Discard(10, 54, false), Call::Discard(10, 54, false)];
    assert_eq!(victim.disk.calls(), calls, "secure only where it was offered");
    for count in [55, u64::MAX, u64::MAX - 9] {
        discard.set_nr_sectors(count);
        assert_status(&mut victim, &discard, -1);
    }

    victim.queue.set_disk(DiskInfo {
        read_only: true,
        ..info
    });
    discard.set_nr_sectors(1);
    assert_status(&mut victim, &discard, -1);
    for operation in [1, 2, 3] {
        assert_status(&mut victim, &request(abi, operation, 0, &data), -1);
    }
    assert_status(&mut victim, &request(abi, 0, 0, &data), 0);
    assert_eq!(victim.disk.calls(), [Call::Read(0, 4096)]);
    victim.queue.set_disk(DiskInfo { flush: false, ..info });
    assert_status(&mut victim, &request(abi, 3, 0, &[]), -2);
    assert_status(&mut victim, &request(abi, 2, 0, &[]), -2);
    victim.queue.set_disk(info);
    victim.disk.fail(Some(DiskError::Failed));
    assert_status(&mut victim, &request(abi, 3, 0, &[]), -1);
    assert_status(&mut victim, &request(abi, 1, 0, &data), -1);
    victim.disk.fail(Some(DiskError::NotSupported));
    assert_status(&mut victim, &discard, -2);
}

#[test]
fn t216_every_byte_of_a_response_slot_is_a_field_or_zero() {
    for abi in Abi::ALL {
        let mut victim = Victim::new(BackendConfig::new(abi, true));
        victim.liar.memory().write(64, &[0xDB; 4096 - 64]);
        let mut slot = Slot::from_bytes(abi, &[0xDB; 112]);
        slot.set_operation(77);
        victim.ask(&slot);
        let bytes = victim.liar.slot_bytes(0);
        let mut expected = RawResponse {
            id: slot.id(),
            operation: 77,
            status: -2,
        }
        .to_bytes()
        .to_vec();
        expected.resize(slot_size(abi), 0);
        assert_eq!(bytes, expected);
        assert!(response_size(abi) <= bytes.len());
    }
}

/// Counts the loads of every byte, and spoils each right after the first.
#[derive(Default)]
struct Spoiler {
    loads: Mutex<HashMap<(usize, usize), u32>>,
    spoil: Mutex<bool>,
}

impl Observer for Spoiler {
    fn loaded(&self, pages: &HeapPages, offset: usize, len: usize) {
        if !*self.spoil.lock().unwrap() {
            return;
        }
        let base = pages.id();
        let mut loads = self.loads.lock().unwrap();
        for byte in offset..offset + len {
            *loads.entry((base, byte)).or_default() += 1;
            if byte >= 64 {
                pages.view().write(byte, &[0xFF]);
            }
        }
    }
}

#[test]
fn t155_a_request_is_loaded_once_and_judged_on_what_was_loaded() {
    for config in configs() {
        let spoiler = Arc::new(Spoiler::default());
        let domain = FakeDomain::new();
        domain.observe(spoiler.clone());
        let mut victim = Victim::with(domain, RamDisk::new(64), config);
        let (gref, page) = victim.page();
        let direct = request(config.abi, 1, 8, &[(gref, 0, 7), (gref, 1, 2)]);
        let (mut indirect, _segments) = indirect(
            &victim,
            1,
            3,
            RawSegment {
                gref,
                first_sect: 1,
                last_sect: 6,
            },
        );
        indirect.set_sector_number(32);
        for (slot, call) in [
            (direct, Call::Write(8, 10 * 512)),
            (indirect, Call::Write(32, 18 * 512)),
        ] {
            page.write(0, &[7; 4096]);
            victim.liar.send(&slot);
            *spoiler.spoil.lock().unwrap() = true;
            let progress = victim.queue.process(&victim.disk, &mut NullPort, 8).unwrap();
            *spoiler.spoil.lock().unwrap() = false;
            assert_eq!(progress.served, 1);
            assert_eq!(victim.disk.calls(), [call], "as the first load said");
            let loads = core::mem::take(&mut *spoiler.loads.lock().unwrap());
            let ring = victim.liar.memory().heap_id();
            for ((heap, byte), count) in loads {
                if Some(heap) == ring && byte < 64 {
                    // Control words: once a look, and only those that the peer writes.
                    assert!(
                        (0..4).contains(&byte) || (12..16).contains(&byte),
                        "T-313: byte {byte}"
                    );
                } else if Some(heap) != page.heap_id() {
                    assert_eq!(count, 1, "byte {byte} of {heap} was loaded again");
                }
            }
            // The slot was spoiled after it was read, but the answer is to what was read.
            let response = victim.liar.response(victim.sent);
            victim.sent += 1;
            assert_eq!((response.id, response.status), (slot.id(), 0));
        }
    }
}

#[test]
fn pvr10_the_peers_copy_of_our_words_is_never_believed() {
    let abi = Abi::X86_64;
    let mut victim = Victim::new(BackendConfig::new(abi, true));
    let (gref, _page) = victim.page();
    for round in 0..100 {
        victim.liar.memory().store_u32(4, round * 77);
        victim.liar.memory().store_u32(8, round.wrapping_mul(0x1234_5678));
        assert_status(&mut victim, &request(abi, 0, 0, &[(gref, 0, 7)]), 0);
    }
}

#[test]
fn t39_nonsense_ends_this_connection_once_and_cleanly() {
    for ahead in [33, 64, 1 << 31, u32::MAX] {
        let mut victim = Victim::new(BackendConfig::new(Abi::X86_64, true));
        let (gref, _page) = victim.page();
        assert_status(&mut victim, &request(Abi::X86_64, 0, 0, &[(gref, 0, 7)]), 0);
        victim.liar.set_req_prod(1u32.wrapping_add(ahead));
        for _ in 0..3 {
            let broken = victim.queue.process(&victim.disk, &mut NullPort, 8).unwrap_err();
            assert_eq!(broken.room, 32);
        }
        let domain = victim.domain.clone();
        assert!(domain.mappings() > 0);
        victim.queue.disconnect();
        assert_eq!(domain.mappings(), 0);
    }
}

#[test]
fn pvr7_a_call_serves_its_budget_and_returns() {
    let abi = Abi::X86_64;
    let mut victim = Victim::new(BackendConfig::new(abi, true));
    let (gref, _page) = victim.page();
    for _ in 0..32 {
        victim.liar.send(&request(abi, 0, 0, &[(gref, 0, 7)]));
    }
    for _ in 0..4 {
        let progress = victim.queue.process(&victim.disk, &mut NullPort, 7).unwrap();
        assert!(progress.served == 7 && progress.more);
    }
    let progress = victim.queue.process(&victim.disk, &mut NullPort, 7).unwrap();
    assert!(progress.served == 4 && !progress.more);
    let progress = victim.queue.process(&victim.disk, &mut NullPort, 7).unwrap();
    assert!(
        progress.served == 0 && !progress.more,
        "a spurious event is seen as one"
    );
    assert!(victim.queue.process(&victim.disk, &mut NullPort, 0).unwrap().more);
}

/// T-71, T-362, T-365, T-371: mapping or copying fails at the `k`th reference, for all `k`.
#[test]
fn t365_every_failure_in_every_step_leaves_records_that_are_true() {
    for base in configs() {
        for limit in [0, 3, 100] {
            let config = BackendConfig {
                persistent_limit: limit,
                ..base
            };
            for (requests, fails) in [(1, true), (0, true), (1, false)] {
                for k in 0..9 {
                    one_failure(config, requests, k, fails);
                }
            }
        }
    }
}

fn one_failure(config: BackendConfig, operation: u8, k: usize, is_indirect: bool) {
    let mut victim = Victim::new(config);
    let pages: Vec<_> = (0..8).map(|_| victim.page()).collect();
    let segments: Vec<(GrantRef, u8, u8)> = pages.iter().map(|(gref, _)| (*gref, 0, 7)).collect();
    let slot = if is_indirect {
        let raw = RawSegment {
            gref: GrantRef(0),
            first_sect: 0,
            last_sect: 7,
        };
        let (slot, table) = indirect(&victim, operation, 8, raw);
        for (i, (gref, _)) in pages.iter().enumerate() {
            table.write(i * 8, &RawSegment { gref: *gref, ..raw }.to_bytes());
        }
        slot
    } else {
        request(config.abi, operation, 0, &segments)
    };
    let mut count = 0;
    let failed = Arc::new(Mutex::new(None));
    let seen = failed.clone();
    victim.domain.on_fault(move |point| {
        count += 1;
        if count - 1 < k {
            return None;
        }
        // From the k-th on everything fails, each in its own way; the first is what counts.
        let status = GrantStatus(-20 - i16::try_from(count).unwrap());
        seen.lock().unwrap().get_or_insert((point, status));
        Some(status)
    });
    let response = victim.ask(&slot);
    let first = *failed.lock().unwrap();
    match first {
        None => assert_eq!(response.status, 0),
        Some((point, status)) => {
            assert_eq!(response.status, -1);
            // Within one batch the order is the references'; over several batches the earlier wins.
            if !matches!(point, FaultPoint::Buffer | FaultPoint::Copy) {
                assert_eq!(victim.queue.last_failure(), Some(Failure::Grant(status)));
            }
        }
    }
    assert_eq!(
        victim.domain.mappings(),
        1 + victim.queue.persistent_mappings(),
        "the ring and what is recorded, nothing else"
    );
    victim.domain.on_fault(|_| None);
    let response = victim.ask(&slot);
    assert_eq!(response.status, 0, "and the next request is served");
    let domain = victim.domain.clone();
    victim.queue.disconnect();
    assert_eq!(domain.mappings(), 0, "T-371");
}

#[test]
fn pvr9_persistent_mappings_stay_below_their_limit_and_leave_when_unused() {
    let config = BackendConfig {
        persistent_limit: 40,
        ..BackendConfig::new(Abi::X86_64, true)
    };
    let mut victim = Victim::new(config);
    let pages: Vec<_> = (0..100).map(|_| victim.page().0).collect();
    for gref in &pages {
        assert_status(&mut victim, &request(config.abi, 0, 0, &[(*gref, 0, 7)]), 0);
        assert!(victim.domain.mappings() <= 41);
    }
    assert_eq!(victim.queue.persistent_mappings(), 40);
    victim.queue.tick(100);
    assert_eq!(
        victim.queue.persistent_mappings(),
        38,
        "5 % leave when the limit was too small"
    );
    victim.queue.tick(60_100);
    assert_eq!(
        (victim.queue.persistent_mappings(), victim.domain.mappings()),
        (0, 1)
    );
}

/// A disk whose driver has a bug.
struct PanickingDisk;

impl Disk for PanickingDisk {
    fn info(&self) -> DiskInfo {
        DiskInfo::new(64)
    }

    fn read(&self, _: u64, _: &[SharedSliceMut<'_>]) -> Result<(), DiskError> {
        panic!("a bug in the disk")
    }

    fn write(&self, _: u64, _: &[SharedSlice<'_>]) -> Result<(), DiskError> {
        panic!("a bug in the disk")
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64, _: bool) -> Result<(), DiskError> {
        Ok(())
    }
}

#[test]
fn pvr6_a_panic_in_the_disk_leaks_no_mapping() {
    let mut victim = Victim::new(BackendConfig::new(Abi::X86_64, false));
    let (gref, _page) = victim.page();
    victim.liar.send(&request(Abi::X86_64, 1, 0, &[(gref, 0, 7)]));
    let domain = victim.domain.clone();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        victim.queue.process(&PanickingDisk, &mut NullPort, 1).map(drop)
    }));
    assert!(panicked.is_err());
    assert_eq!(domain.mappings(), 2);
    drop(victim);
    assert_eq!(domain.mappings(), 0);
}

#[test]
fn a_reference_that_stands_twice_is_mapped_and_served_twice() {
    for config in configs() {
        let mut victim = Victim::new(config);
        let (gref, page) = victim.page();
        page.write(0, &[3; 4096]);
        let slot = request(config.abi, 1, 0, &[(gref, 0, 7), (gref, 0, 7), (gref, 4, 4)]);
        assert_status(&mut victim, &slot, 0);
        assert!(victim.disk.content()[..17 * 512].iter().all(|byte| *byte == 3));
        let kept = if config.persistent { 1 } else { 0 };
        assert_eq!(victim.queue.persistent_mappings(), kept);
        assert_eq!(victim.domain.mappings(), 1 + kept);
    }
}

#[test]
fn read_only_grants_are_written_to_by_nobody() {
    for config in configs() {
        let mut victim = Victim::new(config);
        let (gref, page) = victim.liar.data_page(Access::ReadOnly).unwrap();
        page.write(0, &[9; 4096]);
        assert_status(&mut victim, &request(config.abi, 0, 0, &[(gref, 0, 7)]), -1);
        assert!(holds(&page, 9));
        let status = if config.persistent { -1 } else { 0 };
        assert_status(&mut victim, &request(config.abi, 1, 0, &[(gref, 0, 7)]), status);
    }
}

#[test]
fn rings_that_are_none_are_refused_without_a_mapping_left() {
    let domain = FakeDomain::new();
    let disk = RamDisk::new(8);
    let liar = HostileFrontend::new(&domain, Abi::X86_64, 2).unwrap();
    let config = BackendConfig::new(Abi::X86_64, true);
    let connect = |ring: &[GrantRef]| {
        let result = BackendQueue::connect(domain.grantee(), ring, config, disk.info()).map(drop);
        assert_eq!(domain.mappings(), 0);
        result.is_ok()
    };
    let ring = liar.ring();
    assert!(!connect(&[]));
    assert!(!connect(&[GrantRef(5)]));
    assert!(!connect(&[ring[0], GrantRef(u32::MAX)]));
    assert!(!connect(&[ring[1], ring[0]]));
    assert!(connect(ring));
    liar.memory().store_u32(0, 65);
    assert!(!connect(ring), "more unanswered than there are slots");
    liar.memory().store_u32(0, 64);
    assert!(connect(ring));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Any bytes at all in slots and segment pages: one answer each, no panic, nothing mapped beyond the
    /// records, nothing of the peer's written that no read request named.
    #[test]
    fn any_slots_are_answered(
        seed in any::<u64>(),
        raw in prop::collection::vec(prop::collection::vec(any::<u8>(), 112), 1..30),
        which in 0..12usize,
    ) {
        let config = configs()[which];
        let mut victim = Victim::new(config);
        let pages: Vec<_> = (0..4).map(|_| victim.page()).collect();
        let read_only = victim.liar.data_page(Access::ReadOnly).unwrap();
        read_only.1.write(0, &[0x77; 4096]);
        let mut random = seed | 1;
        let mut next = move |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        for bytes in raw {
            let mut slot = Slot::from_bytes(config.abi, &bytes);
            // Near the truth, or else nothing but the first check is met.
            slot.set_operation(u8::try_from(next(8)).unwrap());
            slot.set_second(u8::try_from(next(13)).unwrap());
            slot.set_half(u16::try_from(next(600)).unwrap());
            slot.set_sector_number(next(80));
            let mut raw_segment = || {
                let gref = match next(6) {
                    4 => read_only.0,
                    5 => GrantRef(u32::try_from(next(100)).unwrap()),
                    page => pages[usize::try_from(page).unwrap()].0,
                };
                let first_sect = u8::try_from(next(9)).unwrap();
                RawSegment { gref, first_sect, last_sect: u8::try_from(next(9)).unwrap() }
            };
            if slot.operation() == 6 {
                for i in 0..512 {
                    pages[0].1.write(i * 8, &raw_segment().to_bytes());
                }
                slot.set_indirect_page(0, pages[0].0);
                slot.set_indirect_page(1, pages[0].0);
            } else {
                (0..11).for_each(|i| slot.set_segment(i, raw_segment()));
            }
            let response = victim.ask(&slot);
            prop_assert!([0, -1, -2].contains(&response.status));
            if config.persistent_limit == 0 {
                prop_assert_eq!(victim.domain.mappings(), 1);
            }
            prop_assert_eq!(victim.domain.mappings(), 1 + victim.queue.persistent_mappings());
        }
        prop_assert!(holds(&read_only.1, 0x77));
        let stats = victim.queue.stats();
        let all = stats.reads + stats.writes + stats.flushes + stats.discards + stats.failures;
        prop_assert_eq!(all, u64::from(victim.sent));
    }
}

#[test]
fn failures_say_what_and_why() {
    let mut victim = Victim::new(BackendConfig::new(Abi::X86_64, false));
    victim.ask(&request(Abi::X86_64, 0, 60, &[(GrantRef(8), 0, 7)]));
    let failure = victim.queue.last_failure().unwrap();
    assert_eq!(
        failure,
        Failure::Request(BadRequest::OutOfRange {
            sector: 60,
            count: 8,
            size: 64
        })
    );
    assert_eq!(failure.to_string(), "8 sectors from 60 leave the disk of 64");
}
