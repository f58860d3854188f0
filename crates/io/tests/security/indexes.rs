//! Catalogue 11.1: indexes that a peer writes, and memory that is read twice.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use gnttab_abi::{Abi, GrantRef};
use gnttab_io::blkif::{BackendConfig, Data, DeviceProperties, Io};
use gnttab_io::fake::FakeDomain;
use gnttab_io::ring::{BackRing, FrontRing};
use gnttab_io::shared::{HeapPages, Observer};

use crate::rig::{Auditor, PROPERTIES, Served, Used, content, direct, indirect, part, read};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;

/// A peer that puts another value where we have just looked, and counts how often we look.
struct Turncoat {
    word: usize,
    looks: Mutex<u32>,
}

impl Turncoat {
    fn at(word: usize) -> Arc<Turncoat> {
        Arc::new(Turncoat {
            word,
            looks: Mutex::new(0),
        })
    }

    fn looks(&self) -> u32 {
        *self.looks.lock().unwrap()
    }
}

impl Observer for Turncoat {
    fn loaded(&self, pages: &HeapPages, offset: usize, _: usize) {
        if offset == self.word {
            *self.looks.lock().unwrap() += 1;
            pages.view().store_u32(self.word, 0x8000_0000);
        }
    }
}

/// The value that was judged is the value that is used: what the peer writes after our look counts at the next one.
#[test]
fn xsa_38_a_backend_looks_at_the_producer_once() {
    let turncoat = Turncoat::at(REQ_PROD);
    let heap = HeapPages::observed(1, turncoat.clone());
    let mut front = FrontRing::init(heap.view(), 16).unwrap();
    // Attaching is a look too; what was written over it is put right.
    let mut back = BackRing::attach(heap.view(), 16).unwrap();
    heap.view().store_u32(REQ_PROD, 0);
    for _ in 0..3 {
        front.push(b"?").unwrap();
    }
    front.publish();
    let before = turncoat.looks();
    for _ in 0..3 {
        let owed = back.take(&mut [0; 16]).unwrap().expect("as the first look said");
        back.respond(owed, &[]);
    }
    assert_eq!(turncoat.looks(), before + 1);
    assert!(back.take(&mut [0; 16]).is_err(), "as the second says");
    assert_eq!(turncoat.looks(), before + 2);
}

#[test]
fn xsa_38_a_frontend_looks_at_the_producer_once() {
    let turncoat = Turncoat::at(RSP_PROD);
    let heap = HeapPages::observed(1, turncoat.clone());
    let mut front = FrontRing::init(heap.view(), 16).unwrap();
    for _ in 0..3 {
        front.push(b"?").unwrap();
    }
    front.publish();
    heap.view().store_u32(RSP_PROD, 3);
    for _ in 0..3 {
        assert!(front.take(&mut [0; 16]).unwrap(), "as the first look said");
    }
    assert_eq!(turncoat.looks(), 1);
    assert!(front.take(&mut [0; 16]).is_err(), "as the second says");
}

/// Whatever a backend refuses, it keeps nothing of it, and the interface lives on.
#[test]
fn xsa_39_a_hundred_thousand_bad_requests_leave_nothing() {
    for persistent in [false, true] {
        let abi = Abi::X86_64;
        let mut served = Served::new(BackendConfig::new(abi, persistent));
        let (good, _page) = served.page();
        let stranger = GrantRef(u32::MAX);
        let bad_table = indirect(&served, 0, 0, &[part(good, 0, 7), part(stranger, 0, 0)]);
        let mut no_table = bad_table;
        no_table.set_indirect_page(0, stranger);
        let requests = [
            direct(abi, 77, 0, &[]),
            direct(abi, 0, 0, &[part(good, 7, 6)]),
            direct(abi, 1, 0, &[part(good, 0, 7), part(stranger, 0, 7)]),
            direct(abi, 0, u64::MAX, &[part(good, 0, 7)]),
            bad_table,
            no_table,
        ];
        let mut held = None;
        for round in 0..100_000 {
            assert!(served.ask(&requests[round % requests.len()]).status < 0);
            if round == 1000 {
                held = Some((served.domain.mappings(), served.domain.pages()));
            }
        }
        assert_eq!(held, Some((served.domain.mappings(), served.domain.pages())));
        assert_eq!(served.ask(&direct(abi, 1, 0, &[part(good, 0, 7)])).status, 0);
    }
}

/// Counts what is loaded, and spoils each byte behind the header right after its first load.
#[derive(Default)]
struct Spoiler {
    armed: Mutex<bool>,
    loads: Mutex<HashMap<(usize, usize), u32>>,
}

impl Spoiler {
    fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        *self.armed.lock().unwrap() = true;
        let result = work();
        *self.armed.lock().unwrap() = false;
        result
    }
}

impl Observer for Spoiler {
    fn loaded(&self, pages: &HeapPages, offset: usize, len: usize) {
        if !*self.armed.lock().unwrap() {
            return;
        }
        for byte in offset..offset + len {
            *self.loads.lock().unwrap().entry((pages.id(), byte)).or_default() += 1;
            // The header's words are judged by themselves: T-38.
            if byte >= 64 {
                pages.view().write(byte, &[0xFF]);
            }
        }
    }
}

/// A response is judged on the one copy that was made of it, and of the frontend's own words none is read back (T-313).
#[test]
fn xsa_155_a_response_and_its_data_are_loaded_once() {
    for persistent in [false, true] {
        let spoiler = Arc::new(Spoiler::default());
        let domain = FakeDomain::new();
        domain.observe(spoiler.clone());
        let properties = DeviceProperties {
            persistent,
            ..PROPERTIES
        };
        let mut used = Used::with(domain.clone(), domain.granter(), properties);
        let ring = used.liar.memory().heap_id();
        for token in 0..3 {
            used.submit(token, read(0, 20));
            let index = u32::try_from(token).unwrap();
            let table = used.liar.request(index);
            for i in 0..usize::from(table.second()) {
                let page = domain.peek(table.segment(i).gref).unwrap();
                page.write(0, &[0x5A; 4096]);
            }
            used.answer(index, 0);
            let (done, broken) = spoiler.during(|| used.poll_all());
            assert_eq!((done.len(), broken), (1, None));
            assert_eq!(done[0].result, Ok(()), "as the first load said");
            let Io::Read {
                data: Data::Own(data),
                ..
            } = &done[0].io
            else {
                panic!("a read")
            };
            assert!(data.iter().all(|byte| *byte == 0x5A), "as the first load said");
            for ((heap, byte), count) in spoiler.loads.lock().unwrap().drain() {
                if Some(heap) == ring && byte < 64 {
                    let theirs = (RSP_PROD..RSP_PROD + 4).contains(&byte)
                        || (REQ_EVENT..REQ_EVENT + 4).contains(&byte);
                    assert!(theirs, "byte {byte} is ours to write, never to read back");
                } else {
                    assert_eq!(count, 1, "byte {byte} of {heap} was loaded again");
                }
            }
        }
    }
}

/// What a peer is shown of a ring, and of the pages that hold segments, is zeros and what was written: whatever the memory
/// held before.
#[test]
fn xsa_313_a_shared_page_shows_nothing_that_was_there_before() {
    let domain = FakeDomain::new();
    let mut used = Used::with(domain.clone(), domain.granter().with_stale_pages(), PROPERTIES);
    let mut expected = [0; 4096];
    expected[REQ_EVENT] = 1;
    expected[RSP_EVENT] = 1;
    assert_eq!(content(used.liar.memory()), expected);

    used.submit(1, read(0, 20 * 8));
    let slot = used.liar.request(0);
    assert_eq!((slot.operation(), slot.half()), (6, 20));
    let table = content(&domain.peek(slot.indirect_page(0)).unwrap());
    assert!(
        table[..20 * 8]
            .chunks(8)
            .all(|segment| segment[5] == 7 && segment[6..] == [0, 0])
    );
    assert!(table[20 * 8..].iter().all(|byte| *byte == 0));
    // The slot behind the request too.
    assert!(slot.bytes()[64..].iter().all(|byte| *byte == 0));
}

/// From the moment when the peer can reach a ring it is a ring: made first, granted then, to one domain and once a page.
#[test]
fn xsa_99_a_ring_is_whole_before_anybody_can_reach_it() {
    let domain = FakeDomain::new();
    let auditor = Auditor::new(domain.granter().with_stale_pages());
    let used = Used::with(domain, auditor.clone(), PROPERTIES);
    let [(gref, ring)] = auditor.at_grant()[..] else {
        panic!("a ring of one page has one grant")
    };
    assert_eq!(ring, content(used.liar.memory()));
    assert!(ring[64..].iter().all(|byte| *byte == 0));
    assert_eq!(used.domain.references(), [gref], "nothing else can be reached");
}
