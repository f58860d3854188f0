//! Catalogue 11.3: responses, and what a page tells beside its data.

use gnttab_abi::Abi;
use gnttab_io::blkif::{DeviceProperties, Io, RawResponse};
use gnttab_io::fake::{Event, FakeDomain, HostileBackend};

use crate::rig::{Auditor, PROPERTIES, Used, content, read, write};

/// Responses of every kind, mixed: each page is with one owner at every step, and comes back with the references that grant
/// it. The [`Auditor`] fails the test at the first page that is granted or given back twice.
#[test]
fn xsa_405_every_page_has_one_owner_whatever_is_answered() {
    let mut random = 1u64;
    let mut next = move |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % limit
    };
    for round in 0..400 {
        let domain = FakeDomain::new();
        let auditor = Auditor::new(domain.granter());
        let persistent = round % 2 == 0;
        let properties = DeviceProperties {
            persistent,
            ..PROPERTIES
        };
        let mut used = Used::with(domain.clone(), auditor, properties);
        let (mut asked, mut answered) = (0, 0);
        for token in 0..30 {
            let io = if next(2) == 0 {
                read(token, 30)
            } else {
                write(token, 30, 7)
            };
            used.submit(token, io);
            asked = used.liar.req_prod().max(asked);
            if answered == asked {
                continue;
            }
            let slot = used.liar.request(answered);
            let honest = RawResponse {
                id: slot.id(),
                operation: slot.operation(),
                status: 0,
            };
            match next(12) {
                // It keeps a page of the request.
                0 => {
                    used.liar.hold(slot.segment(0).gref);
                    used.liar.respond(honest);
                }
                1 => used.liar.respond(RawResponse { status: -1, ..honest }),
                2 => used.liar.respond(RawResponse { status: 77, ..honest }),
                3 => used.liar.respond(RawResponse {
                    id: honest.id ^ 1,
                    ..honest
                }),
                4 => used.liar.respond(RawResponse {
                    operation: 5,
                    ..honest
                }),
                5 => {
                    used.liar.respond(honest);
                    used.liar.respond(honest);
                }
                _ => used.liar.respond(honest),
            }
            answered += 1;
            let (_, broken) = used.poll_all();
            // The ring, and a page for each segment at most.
            assert!(domain.pages() <= 1 + 4 * 30);
            if broken.is_some() {
                used.queue.close();
                used.queue.close();
                break;
            }
        }
        drop(used);
        assert_eq!(
            (domain.pages(), domain.grants(), domain.mappings()),
            (0, 0, 0),
            "round {round}"
        );
    }
}

/// A granted page shows the peer what the request is about, and zeros; what the peer writes beside it changes nothing; and
/// the next peer sees nothing of either.
#[test]
fn xsa_403_a_page_shows_the_request_and_zeros() {
    for persistent in [false, true] {
        let properties = DeviceProperties {
            persistent,
            ..PROPERTIES
        };
        let mut used = Used::new(properties);
        used.submit(1, write(8, 3, 0xA5));
        let gref = used.liar.request(0).segment(0).gref;
        let page = used.domain.peek(gref).unwrap();
        let mut expected = [0; 4096];
        expected[..3 * 512].fill(0xA5);
        assert_eq!(content(&page), expected);
        used.answer(0, 0);
        assert_eq!(used.poll_all().0.len(), 1);

        used.submit(2, read(8, 1));
        let gref = used.liar.request(1).segment(0).gref;
        used.domain.peek(gref).unwrap().write(0, &[0xEE; 4096]);
        used.answer(1, 0);
        let (done, _) = used.poll_all();
        assert_eq!(
            done[0].io,
            Io::Read {
                sector: 8,
                data: vec![0xEE; 512].into()
            },
            "what was asked for and not a byte more"
        );

        // Another backend takes over: what the first one wrote and read is not for it.
        used.queue.close();
        let ring = used.queue.open(1, Event::new()).unwrap();
        used.liar = HostileBackend::new(&used.domain, Abi::X86_64, &ring).unwrap();
        used.queue.start(properties);
        used.submit(3, read(0, 1));
        let gref = used.liar.request(0).segment(0).gref;
        assert_eq!(content(&used.domain.peek(gref).unwrap()), [0; 4096]);
    }
}
