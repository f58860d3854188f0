//! Decoding: every structure of the interface from any bytes, and a table of any words, dumped.
//!
//! What must hold: decoding never panics, refuses only what is too short, and what was decoded is
//! encoded to bytes that decode to the same; `dump_table` says of each entry in use what its words
//! say, tells of no other, and a table of any words stays a table; `gnttab decode` makes something of
//! any entry and of any ring, and finds nothing legal that the protocol refuses.

#[rustfmt::skip]
#[path = "../../crates/cli/src/decode/entry.rs"]
#[expect(dead_code, reason = "the command prints the rest")]
mod entry;
#[rustfmt::skip]
#[path = "../../crates/cli/src/decode/ring.rs"]
mod ring;

use gnttab_abi::{
    Abi, CacheFlush, Copy, DomId, DumpTable, EncodeError, EntryFlags, EntryType, EntryV1, EntryV2,
    GetStatusFrames, GetVersion, GrantRef, MapFlags, MapGrantRef, Op, PAGE_SIZE, QuerySize, SetVersion,
    SetupTable, SwapGrantRef, Transfer, Truncated, UnmapAndReplace, UnmapGrantRef,
};
use gnttab_engine::machine::Machine;
use gnttab_engine::{Config, DomainKind, Engine, EntryWords, Limits, Vcpu};
use gnttab_io::blkif::{Request, Slot, slot_size};
use gnttab_io::ring::RingShape;

use crate::input::Input;

/// Plays an input: four bytes that say what is to be done, and the words.
///
/// # Panics
/// When a rule of the module's head is broken.
pub fn run(input: &[u8]) {
    arguments(input);
    at_rest(input);
    table(&mut Input::new(input));
}

fn arguments(bytes: &[u8]) {
    for abi in Abi::ALL {
        structure(
            abi,
            bytes,
            Op::MapGrantRef,
            MapGrantRef::encode,
            MapGrantRef::decode,
        );
        structure(
            abi,
            bytes,
            Op::UnmapGrantRef,
            UnmapGrantRef::encode,
            UnmapGrantRef::decode,
        );
        structure(abi, bytes, Op::SetupTable, SetupTable::encode, SetupTable::decode);
        structure(abi, bytes, Op::DumpTable, DumpTable::encode, DumpTable::decode);
        structure(abi, bytes, Op::Transfer, Transfer::encode, Transfer::decode);
        structure(abi, bytes, Op::Copy, Copy::encode, Copy::decode);
        structure(abi, bytes, Op::QuerySize, QuerySize::encode, QuerySize::decode);
        structure(
            abi,
            bytes,
            Op::UnmapAndReplace,
            UnmapAndReplace::encode,
            UnmapAndReplace::decode,
        );
        structure(abi, bytes, Op::SetVersion, SetVersion::encode, SetVersion::decode);
        structure(
            abi,
            bytes,
            Op::GetStatusFrames,
            GetStatusFrames::encode,
            GetStatusFrames::decode,
        );
        structure(abi, bytes, Op::GetVersion, GetVersion::encode, GetVersion::decode);
        structure(
            abi,
            bytes,
            Op::SwapGrantRef,
            SwapGrantRef::encode,
            SwapGrantRef::decode,
        );
        structure(abi, bytes, Op::CacheFlush, CacheFlush::encode, CacheFlush::decode);
    }
}

fn structure<T: PartialEq + std::fmt::Debug>(
    abi: Abi,
    bytes: &[u8],
    op: Op,
    encode: impl Fn(&T, Abi, &mut [u8]) -> Result<(), EncodeError>,
    decode: impl Fn(Abi, &[u8]) -> Result<T, Truncated>,
) {
    let size = op.arg_size(abi);
    let item = match decode(abi, bytes) {
        Ok(item) => item,
        Err(short) => {
            let wanted = Truncated {
                needed: size,
                got: bytes.len(),
            };
            assert_eq!(short, wanted);
            return assert!(bytes.len() < size);
        }
    };
    let mut again = bytes[..size].to_vec();
    encode(&item, abi, &mut again).expect("what was decoded can be encoded");
    assert_eq!(decode(abi, &again).as_ref(), Ok(&item), "{op} of {abi:?}");
    // Every bit that means something is kept, and the padding is the buffer's.
    let mut zeroed = vec![0; size];
    encode(&item, abi, &mut zeroed).expect("what was decoded can be encoded");
    for (at, (kept, written)) in bytes.iter().zip(zeroed).enumerate() {
        assert!(*kept == written || written == 0, "byte {at} of {op}, {abi:?}");
    }
}

/// Entries and rings as `gnttab decode` reads them.
fn at_rest(bytes: &[u8]) {
    for (number, words) in bytes.chunks_exact(16).enumerate() {
        let gref = GrantRef(u32::try_from(number).expect("a short input"));
        let owner = (words[0] & 64 != 0).then_some(DomId(u16::from(words[1])));
        let entry = EntryV2::from_bytes(words.try_into().expect("sixteen bytes"));
        assert_eq!(EntryV2::from_bytes(entry.to_bytes()), entry);
        let status = EntryFlags::from_bits_retain(u16::from(words[15]) << 3);
        let judged = entry::v2(gref, entry, Some(status), owner);
        assert!(!judged.is_live() || entry.head.flags.kind() != EntryType::Invalid);
        assert!(judged.is_in_use() == status.intersects(EntryFlags::IN_USE) || !judged.is_live());
        let old = EntryV1::from_bytes(words[..8].try_into().expect("eight bytes"));
        assert_eq!(EntryV1::from_bytes(old.to_bytes()), old);
        let judged = entry::v1(gref, old, owner);
        assert!(!judged.is_live() || old.head.flags.kind() != EntryType::Invalid);
        let _ = (entry::status(gref, status).worst(), entry::reserved_name(gref.0));
    }
    let mut page = vec![0; PAGE_SIZE];
    let given = bytes.len().min(PAGE_SIZE);
    page[..given].copy_from_slice(&bytes[..given]);
    for abi in Abi::ALL {
        let shape = RingShape::new(1, slot_size(abi)).expect("a ring of one page");
        let ring = ring::decode(&page, shape, abi).expect("a page is a ring of some kind");
        assert!(ring.outstanding.len() <= shape.slots() as usize);
        assert!(ring.answered.len() <= shape.slots() as usize);
        for asked in &ring.outstanding {
            let mut slot = Slot::new(abi);
            let at = 64 + (asked.index % shape.slots()) as usize * shape.slot_size();
            let room = slot.bytes_mut().len();
            slot.bytes_mut().copy_from_slice(&page[at..at + room]);
            assert_eq!(asked.id, slot.id());
            assert_eq!(
                asked.is_legal,
                Request::parse(&slot, 4096).is_ok(),
                "{}",
                asked.what
            );
        }
    }
}

fn table(input: &mut Input<'_>) {
    let head = input.byte();
    let (kind, version) = (
        [DomainKind::Pv, DomainKind::Hvm, DomainKind::Arm][usize::from(head % 3)],
        1 + u32::from(head & 4 != 0),
    );
    let machine = Machine::new();
    let engine = Engine::new(machine.clone(), Config::default());
    let [granter, grantee] = [1, 2].map(|id| {
        let guest = machine.add_domain(DomId(id), kind).expect("a new domain");
        let limits = Limits {
            grant_frames: Some(2),
            ..Limits::default()
        };
        let id = DomId(id);
        engine
            .create_domain(id, kind, limits, guest)
            .expect("a new domain")
    });
    let frame = granter.private().add_page().expect("a page").gfn.0;
    let vcpu = Vcpu::take(&granter, 0).expect("a vCPU");
    let mut cpu = engine.any_processor().expect("a processor");
    cpu.set_version(&vcpu, version).expect("nothing is in use");
    let page = machine
        .page(granter.shared_frame(0).expect("a first frame").mfn())
        .expect("memory");

    // A few entries of any words, at any place.
    let size = if version == 1 { 8 } else { 16 };
    let most = 4096 / size;
    let mut written = std::collections::BTreeMap::new();
    while !input.is_empty() && written.len() < 24 {
        let gref = usize::from(input.u16()) % most;
        let mut words = [0; 16];
        let given = input.bytes(size);
        words[..given.len()].copy_from_slice(given);
        if head & 8 != 0 {
            // One that can be mapped.
            let at = if version == 1 { 4 } else { 8 };
            words[at..at + 4].copy_from_slice(&frame.to_le_bytes()[..4]);
            let flags = words[0] & 0x84 | 1;
            words[..4].copy_from_slice(&[flags, 0, 2, 0]);
        }
        assert!(page.write(gref * size, &words[..size]));
        written.insert(gref, ());
    }
    let caller = Vcpu::take(&grantee, 0).expect("a vCPU");
    for (number, gref) in written.keys().enumerate().take(4) {
        let mut item = MapGrantRef {
            host_addr: 0x4000_0000 + number as u64 * 4096,
            flags: MapFlags::HOST_MAP | MapFlags::READONLY,
            gref: GrantRef(*gref as u32),
            dom: DomId(1),
            ..MapGrantRef::default()
        };
        cpu.map(&caller, std::slice::from_mut(&mut item));
    }

    let text = cpu.dump(DomId(1)).expect("a domain");
    assert_eq!(cpu.dump_table(&vcpu, DomId::SELF).as_deref(), Ok(&*text));
    let mut lines = text.lines();
    let first = lines.next().expect("a line for the table");
    assert!(
        first.starts_with(&format!("d1: version {version}, frames ")),
        "{first}"
    );
    lines.next().expect("a line of headings");
    let mut told = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    for gref in 0..u32::MAX {
        let Some(view) = cpu.entry(DomId(1), GrantRef(gref)) else {
            break;
        };
        let at = gref as usize * size;
        let mut words = [0; 16];
        if at < 4096 {
            assert!(page.read(at, &mut words[..size]));
        }
        // What the view says is what the memory holds.
        let flags = view.words.flags();
        let (own, domid, frame) = match view.words {
            EntryWords::V1(entry) => {
                assert_eq!(
                    EntryV1::from_bytes(words[..8].try_into().expect("eight bytes")),
                    entry
                );
                (entry.head.flags, entry.head.domid, u64::from(entry.frame))
            }
            EntryWords::V2(entry, _) => {
                assert_eq!(EntryV2::from_bytes(words), entry);
                (entry.head.flags, entry.head.domid, entry.frame)
            }
        };
        // The marks of version 2 stand elsewhere.
        assert!(flags.contains(own) && (version == 2 || flags == own));
        if flags.is_empty() && !view.pins.any() {
            continue;
        }
        let line = told
            .next()
            .unwrap_or_else(|| panic!("{gref:#x} is not told of\n{text}"));
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number");
        assert_eq!(number(line[0]), u64::from(gref), "{text}");
        let shared = line.iter().position(|word| *word == "|").expect("two halves") + 1;
        assert_eq!(number(line[shared]), u64::from(flags.bits()), "{text}");
        assert_eq!(line[shared + 1], domid.0.to_string(), "{text}");
        assert_eq!(number(line[shared + 2]), frame, "{text}");
    }
    assert_eq!(told.next(), None, "an entry that is free was told of\n{text}");
}
