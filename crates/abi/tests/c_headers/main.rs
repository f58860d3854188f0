//! Layouts, constants, messages and interface-version gates against Xen's public C headers.
//!
//! Nothing is compared by hand: the crate's own tables become C assertions, a C compiler judges
//! them against the headers, and what the headers define but the tables lack is a failure too.
//!
//! The headers are those of Debian's `libxen-dev`, or the directory that `GNTTAB_XEN_INCLUDE` names
//! (the one that holds `xen/`). Where they or a compiler are missing the tests say so and pass;
//! `golden.rs` holds the same layouts for such machines.

mod claims;
mod compiler;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Write as _;

    use gnttab_abi::*;

    use crate::claims::{Structure, assert_c, constants, layouts, structures};
    use crate::compiler::{Compiler, INCLUDES, LATEST, TARGETS};

    #[test]
    fn every_size_offset_and_constant_is_the_headers() {
        for target in &TARGETS {
            let Some(compiler) = Compiler::find(target) else {
                continue;
            };
            let mut source = layouts(target.abi);
            for (name, value) in constants() {
                // Newer than Debian's headers (spec 1.1).
                let optional = name == "DOMID_ANY";
                if optional {
                    writeln!(source, "#ifdef {name}").expect("a string takes any text");
                }
                assert_c(&mut source, &format!("(long long)({name}) == {value}LL"));
                if optional {
                    writeln!(source, "#endif").expect("a string takes any text");
                }
            }
            if let Err(complaints) = compiler.accepts(LATEST, &source) {
                panic!("{}: the headers disagree:\n{complaints}", target.name);
            }
        }
    }

    /// What makes the test above worth something: one wrong number is seen.
    #[test]
    fn a_wrong_claim_is_refused_by_the_compiler() {
        for target in &TARGETS {
            let Some(compiler) = Compiler::find(target) else {
                continue;
            };
            for claim in [
                format!("sizeof(struct gnttab_copy) == {}", Copy::size(target.abi) + 4),
                "offsetof(struct gnttab_map_grant_ref, handle) == 24".to_owned(),
                "(long long)(GNTST_no_space) == 13LL".to_owned(),
            ] {
                let mut source = String::new();
                assert_c(&mut source, &claim);
                let complaints = compiler.accepts(LATEST, &source).expect_err("a false claim");
                assert!(complaints.contains(&claim), "{}: {complaints}", target.name);
            }
        }
    }

    /// Nothing that the grant-table header defines is missing here.
    #[test]
    fn the_header_has_no_constant_and_no_structure_that_we_lack() {
        let Some(compiler) = Compiler::find(&TARGETS[0]) else {
            return;
        };
        let ours: BTreeSet<_> = constants().into_iter().map(|(name, _)| name).collect();
        let prefixes = ["GNTST_", "GNTMAP_", "GNTCOPY_", "GNTTAB_", "GNTTABOP_", "GTF_"];
        let theirs = compiler.macros(LATEST);
        let missing: Vec<_> = theirs
            .iter()
            .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
            // The messages have a test of their own.
            .filter(|name| *name != "GNTTABOP_error_msgs" && !ours.contains(*name))
            .collect();
        assert!(missing.is_empty(), "constants that we lack: {missing:?}");
        assert!(theirs.contains("GNTST_okay"), "the headers were not read");

        let header = std::fs::read_to_string(compiler.include.join("xen/grant_table.h")).expect("the header");
        let theirs: Vec<_> = header
            .lines()
            .filter_map(|line| line.trim().strip_prefix("struct ")?.strip_suffix(" {"))
            .filter(|name| name.starts_with("gnttab_") && *name != "gnttab_copy_ptr")
            .collect();
        assert_eq!(theirs.len(), Op::ALL.len(), "one for each operation: {theirs:?}");
        for name in theirs {
            assert!(
                structures().iter().any(|ours| ours.c == name),
                "we lack struct {name}"
            );
        }
    }

    #[test]
    fn the_messages_are_the_headers() {
        let Some(compiler) = Compiler::find(&TARGETS[0]) else {
            return;
        };
        let source = format!("{INCLUDES}\nmessages_follow GNTTABOP_error_msgs\n");
        let text = compiler
            .run(LATEST, &["-E", "-P"], &source)
            .expect("the headers preprocess");
        let (_, list) = text.split_once("messages_follow").expect("our line is in it");
        let theirs: Vec<_> = list.split('"').skip(1).step_by(2).collect();
        let ours: Vec<_> = GrantStatus::ALL
            .iter()
            .filter_map(|status| status.message())
            .collect();
        assert_eq!(ours, theirs);
    }

    /// Rule 1.2: what `interface_since` says is what headers of that version show.
    #[test]
    fn each_operation_appears_with_its_interface_version() {
        let Some(compiler) = Compiler::find(&TARGETS[0]) else {
            return;
        };
        let shown = |interface: u32, structure: &Structure, op: Op| {
            // Declaring what is declared already is an error: that is how one sees it.
            let again = format!("struct {} {{ char not_the_headers; }};", structure.c);
            let structure_shown = compiler.accepts(&interface.to_string(), &again).is_err();
            let number_shown = compiler
                .macros(&interface.to_string())
                .contains(&format!("GNTTABOP_{}", op.name()));
            assert_eq!(structure_shown, number_shown, "{op} in {interface:#x}");
            structure_shown
        };
        for structure in &structures() {
            let Some(op) = structure.op else { continue };
            match op.interface_since() {
                None => assert!(shown(0, structure, op), "{op} is in every header"),
                Some(since) => {
                    assert!(shown(since, structure, op), "{op} is there from {since:#x}");
                    assert!(
                        !shown(since - 1, structure, op),
                        "{op} is not there before {since:#x}"
                    );
                }
            }
        }
    }

    /// Rule 1.2: the types of version 2, the name of version 1's entry, the kind of setup_table's list.
    #[test]
    fn each_type_appears_with_its_interface_version() {
        let Some(compiler) = Compiler::find(&TARGETS[0]) else {
            return;
        };
        let compiles =
            |interface: u32, source: &str| compiler.accepts(&interface.to_string(), source).is_ok();
        let gate = |since: u32, before: &str, from: &str| {
            assert!(compiles(since, from), "from {since:#x}: {from}");
            assert!(!compiles(since - 1, from), "before {since:#x} not: {from}");
            assert!(compiles(since - 1, before), "before {since:#x}: {before}");
            assert!(!compiles(since, before), "from {since:#x} not: {before}");
        };
        for c in ["union grant_entry_v2", "struct grant_entry_header"] {
            let ours = format!("{c} {{ char not_the_headers; }};");
            let theirs = format!("typedef char is_there[sizeof({c})];");
            gate(INTERFACE_VERSION_2_TABLES, &ours, &theirs);
        }
        gate(
            INTERFACE_VERSION_2_TABLES,
            "typedef struct { char not_the_headers; } grant_status_t;",
            "typedef char is_there[sizeof(grant_status_t)];",
        );
        let entry =
            |name: &str| format!("_Static_assert(sizeof(struct {name}) == {ENTRY_V1_SIZE}, \"{name}\");");
        gate(
            INTERFACE_VERSION_2_TABLES,
            &entry("grant_entry"),
            "struct grant_entry { char not_the_headers; }; typedef struct grant_entry_v1 is_there;",
        );
        let list = |kind: &str| {
            format!(
                "_Static_assert(_Generic(((struct gnttab_setup_table *)0)->frame_list, \
                 XEN_GUEST_HANDLE({kind}): 1, default: 0), \"{kind}\");"
            )
        };
        gate(INTERFACE_SETUP_TABLE_PFNS, &list("ulong"), &list("xen_pfn_t"));
    }

    /// Rule 1.2: an older header hides things; it moves nothing.
    #[test]
    fn layouts_do_not_depend_on_the_interface_version() {
        for target in &TARGETS {
            let Some(compiler) = Compiler::find(target) else {
                continue;
            };
            // Below 0x00040700 the physmap batch has its far domain outside the union.
            let source = layouts(target.abi).replace("u.foreign_domid", "foreign_domid");
            for interface in [INTERFACE_VERSION_2_TABLES, INTERFACE_SETUP_TABLE_PFNS] {
                if let Err(complaints) = compiler.accepts(&interface.to_string(), &source) {
                    panic!(
                        "{} in {interface:#x}: the headers disagree:\n{complaints}",
                        target.name
                    );
                }
            }
        }
    }
}
