//! What this crate claims about the headers, as C: made from the crate's own tables.

use std::fmt::Write as _;

use gnttab_abi::*;

/// An assertion whose text says what does not hold.
pub(crate) fn assert_c(source: &mut String, claim: &str) {
    writeln!(source, "_Static_assert({claim}, \"{claim}\");").expect("a string takes any text");
}

type Fields = &'static [(&'static str, usize, usize)];

/// An argument: its name in C, its size, where its fields lie.
pub(crate) struct Structure {
    pub(crate) c: String,
    pub(crate) op: Option<Op>,
    size: fn(Abi) -> usize,
    fields: fn(Abi) -> Fields,
}

/// Every argument of the interface: of each operation, and of the memory operations.
pub(crate) fn structures() -> Vec<Structure> {
    let mut all = Vec::new();
    macro_rules! add {
        ($type:ident) => {{
            let c = format!("gnttab_{}", Op::$type);
            add!($type, c, Some(Op::$type))
        }};
        ($type:ident, $c:expr, $op:expr) => {
            all.push(Structure {
                c: $c,
                op: $op,
                size: $type::size,
                fields: $type::fields,
            })
        };
    }
    add!(MapGrantRef);
    add!(UnmapGrantRef);
    add!(SetupTable);
    add!(DumpTable);
    add!(Transfer);
    add!(Copy);
    add!(QuerySize);
    add!(UnmapAndReplace);
    add!(SetVersion);
    add!(GetStatusFrames);
    add!(GetVersion);
    add!(SwapGrantRef);
    add!(CacheFlush);
    add!(AddToPhysmap, "xen_add_to_physmap".to_owned(), None);
    add!(AddToPhysmapBatch, "xen_add_to_physmap_batch".to_owned(), None);
    add!(AcquireResource, "xen_mem_acquire_resource".to_owned(), None);
    all
}

/// The name in C of a field of ours.
fn field_in_c(structure: &str, field: &str) -> String {
    match (structure, field) {
        ("gnttab_copy", _) => field.replacen('_', ".", 1),
        ("gnttab_cache_flush", "dev_bus_addr") => "a.dev_bus_addr".to_owned(),
        ("xen_add_to_physmap_batch", "foreign_domid") => "u.foreign_domid".to_owned(),
        (_, "gref") => "ref".to_owned(),
        (_, "kind") => "type".to_owned(),
        _ => field.to_owned(),
    }
}

/// Asserts one structure's size and fields, by their names in C.
fn assert_layout(source: &mut String, c: &str, size: usize, fields: &[(String, usize, usize)]) {
    assert_c(source, &format!("sizeof({c}) == {size}"));
    for (field, offset, size) in fields {
        assert_c(source, &format!("offsetof({c}, {field}) == {offset}"));
        assert_c(source, &format!("sizeof((({c} *)0)->{field}) == {size}"));
    }
}

/// Which bytes a value sets: the first one and how many. How this file learns where a field of
/// an entry lies from nothing but the entry's encoding.
fn touched(bytes: &[u8]) -> (usize, usize) {
    let first = bytes
        .iter()
        .position(|byte| *byte != 0)
        .expect("the field is encoded");
    let last = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .expect("the field is encoded");
    (first, last - first + 1)
}

/// Assertions on every structure of the interface that an ABI has.
pub(crate) fn layouts(abi: Abi) -> String {
    let mut source = String::new();
    if abi == Abi::Arm {
        // Only the Arm half of the headers has it: a posing compiler has fooled them.
        assert_c(&mut source, "XEN_HYPERCALL_TAG == 0xEA1");
    }
    for structure in structures() {
        let renamed =
            |&(field, offset, size): &(&str, usize, usize)| (field_in_c(&structure.c, field), offset, size);
        let fields: Vec<_> = (structure.fields)(abi).iter().map(renamed).collect();
        assert_layout(
            &mut source,
            &format!("struct {}", structure.c),
            (structure.size)(abi),
            &fields,
        );
    }

    // A side of a copy is as long as the distance from one to the other.
    let offset_of = |name| {
        let field = Copy::fields(abi).iter().find(|(field, ..)| *field == name);
        field.expect("a field of the copy").1
    };
    let side = offset_of("dest_u") - offset_of("source_u");
    assert_c(&mut source, &format!("sizeof(struct gnttab_copy_ptr) == {side}"));
    for field in ["u.ref", "u.gmfn"] {
        assert_c(
            &mut source,
            &format!("offsetof(struct gnttab_copy_ptr, {field}) == 0"),
        );
    }

    let head = |flags, domid| EntryHead {
        flags: EntryFlags::from_bits_retain(flags),
        domid: DomId(domid),
    };
    let v1 = |flags, domid, frame| {
        EntryV1 {
            head: head(flags, domid),
            frame,
        }
        .to_bytes()
    };
    let v2 = |body| EntryV2::new(head(0, 0), body).to_bytes();
    let sub_page = |page_off, length, frame| {
        v2(EntryBodyV2::SubPage {
            page_off,
            length,
            frame,
        })
    };
    let transitive = |domid, gref| {
        let (trans_domid, gref) = (DomId(domid), GrantRef(gref));
        v2(EntryBodyV2::Transitive { trans_domid, gref })
    };
    let mut probed = |c: &str, size: usize, fields: &[(&str, &[u8])]| {
        let probe = |(name, bytes): &(&str, &[u8])| {
            let (offset, size) = touched(bytes);
            ((*name).to_owned(), offset, size)
        };
        assert_layout(
            &mut source,
            c,
            size,
            &fields.iter().map(probe).collect::<Vec<_>>(),
        );
    };
    probed(
        "struct grant_entry_v1",
        ENTRY_V1_SIZE,
        &[
            ("flags", &v1(!0, 0, 0)),
            ("domid", &v1(0, !0, 0)),
            ("frame", &v1(0, 0, !0)),
        ],
    );
    let word = |head: EntryHead| head.word().to_le_bytes();
    probed(
        "struct grant_entry_header",
        word(head(0, 0)).len(),
        &[("flags", &word(head(!0, 0))), ("domid", &word(head(0, !0)))],
    );
    probed(
        "union grant_entry_v2",
        ENTRY_V2_SIZE,
        &[
            ("hdr", &word(head(!0, !0))),
            ("full_page.frame", &v2(EntryBodyV2::FullPage { frame: !0 })),
            ("sub_page.page_off", &sub_page(!0, 0, 0)),
            ("sub_page.length", &sub_page(0, !0, 0)),
            ("sub_page.frame", &sub_page(0, 0, !0)),
            ("transitive.trans_domid", &transitive(!0, 0)),
            ("transitive.gref", &transitive(0, !0)),
        ],
    );

    for (c, size) in [
        ("domid_t", size_of::<DomId>()),
        ("grant_ref_t", size_of::<GrantRef>()),
        ("grant_handle_t", size_of::<GrantHandle>()),
        ("grant_status_t", STATUS_WORD_SIZE),
        ("xen_pfn_t", abi.word_size()),
        ("xen_ulong_t", abi.word_size()),
        ("XEN_GUEST_HANDLE(void)", abi.word_size()),
    ] {
        assert_c(&mut source, &format!("sizeof({c}) == {size}"));
    }
    source
}

/// The flags of a set by the names they have in Rust.
fn named_flags<F: bitflags::Flags>() -> impl Iterator<Item = (&'static str, F::Bits)> {
    let named = F::FLAGS.iter().filter(|flag| !flag.name().is_empty());
    named.map(|flag| (flag.name(), flag.value().bits()))
}

/// Every named number of the crate, by its name in the header.
pub(crate) fn constants() -> Vec<(String, i64)> {
    let mut all = Vec::new();
    let mut add = |name: &str, value: i64| all.push((name.to_owned(), value));

    for status in GrantStatus::ALL {
        add(
            &format!("GNTST_{}", status.name().expect("known")),
            status.0.into(),
        );
    }
    for op in Op::ALL {
        add(&format!("GNTTABOP_{}", op.name()), op.number().into());
    }
    for errno in Errno::ALL {
        add(&format!("XEN_{}", errno.name()), errno.number().into());
    }
    // The flags' own names, in the case of the header: the cache bits shout there too.
    for (flag, bits) in named_flags::<EntryFlags>() {
        let shouts = ["PWT", "PCD", "PAT"].contains(&flag);
        let flag = if shouts {
            flag.to_owned()
        } else {
            flag.to_lowercase()
        };
        add(&format!("GTF_{flag}"), bits.into());
    }
    for (flag, bits) in named_flags::<MapFlags>() {
        add(&format!("GNTMAP_{}", flag.to_lowercase()), bits.into());
    }
    for (flag, bits) in named_flags::<CopyFlags>() {
        add(&format!("GNTCOPY_{}", flag.to_lowercase()), bits.into());
    }
    for (flag, bits) in named_flags::<CacheOp>() {
        add(&format!("GNTTAB_CACHE_{flag}"), bits.into());
    }
    for (name, value) in [
        ("GTF_invalid", EntryFlags::empty()),
        ("GTF_permit_access", EntryFlags::PERMIT_ACCESS),
        ("GTF_accept_transfer", EntryFlags::ACCEPT_TRANSFER),
        ("GTF_transitive", EntryFlags::TRANSITIVE),
        ("GTF_type_mask", EntryFlags::TYPE_MASK),
    ] {
        add(name, value.bits().into());
    }
    for (name, id) in [
        ("DOMID_FIRST_RESERVED", DomId::FIRST_RESERVED),
        ("DOMID_SELF", DomId::SELF),
        ("DOMID_IO", DomId::IO),
        ("DOMID_XEN", DomId::XEN),
        ("DOMID_COW", DomId::COW),
        ("DOMID_INVALID", DomId::INVALID),
        ("DOMID_ANY", DomId::ANY),
        ("DOMID_IDLE", DomId::IDLE),
    ] {
        add(name, id.0.into());
    }
    for (name, value) in [
        ("GNTMAP_guest_avail_mask", MapFlags::GUEST_AVAIL_MASK.bits()),
        ("_GNTMAP_guest_avail0", MapFlags::GUEST_AVAIL_SHIFT),
        ("GNTTAB_NR_RESERVED_ENTRIES", NR_RESERVED_ENTRIES),
        ("GNTTAB_RESERVED_CONSOLE", RESERVED_CONSOLE.0),
        ("GNTTAB_RESERVED_XENSTORE", RESERVED_XENSTORE.0),
        ("XENFEAT_gnttab_map_avail_bits", FEATURE_GNTTAB_MAP_AVAIL_BITS),
        ("__HYPERVISOR_grant_table_op", GRANT_TABLE_OP),
        ("__HYPERVISOR_memory_op", MEMORY_OP),
        ("XENMEM_add_to_physmap", MEMOP_ADD_TO_PHYSMAP),
        ("XENMEM_add_to_physmap_batch", MEMOP_ADD_TO_PHYSMAP_BATCH),
        ("XENMEM_acquire_resource", MEMOP_ACQUIRE_RESOURCE),
        ("XENMAPSPACE_grant_table", PHYSMAP_SPACE_GRANT_TABLE),
        ("XENMEM_resource_grant_table", RESOURCE_GRANT_TABLE.into()),
        (
            "XENMEM_resource_grant_table_id_shared",
            RESOURCE_GRANT_TABLE_SHARED,
        ),
        (
            "XENMEM_resource_grant_table_id_status",
            RESOURCE_GRANT_TABLE_STATUS,
        ),
    ] {
        add(name, value.into());
    }
    let bit = i64::try_from(ADD_TO_PHYSMAP_STATUS_BIT).expect("31 bits and one");
    add("XENMAPIDX_grant_table_status", bit);
    all
}
