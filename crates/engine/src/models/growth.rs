//! Arrays and tables that grow while they are used.

use alloc::sync::Arc;

use gnttab_abi::{DomId, GrantRef};
use loom::thread;

use super::every_order;
use super::house::{Home, House};
use super::watched::Watched;
use crate::domain::Version;
use crate::lazy::Lazy;
use crate::segments::Segments;
use crate::table::{Table, entries_per_page};

/// An array against its growth: an element is there whole, with what was written to it when it was
/// made, or not at all; and it stays where it is.
#[test]
fn element_against_growth() {
    every_order(|| {
        let array = Arc::new(Segments::<Watched, 1, 2>::new());
        let make = || {
            let element = Watched::default();
            element.had_alone();
            element
        };
        array.grow(1, make).unwrap();
        let other = Arc::clone(&array);
        let reader = thread::spawn(move || {
            other.get(0).expect("it was there before").used();
            if let Some(element) = other.get(2) {
                element.used();
            }
        });
        array.grow(3, make).unwrap();
        reader.join().unwrap();
    });
}

/// A table's use against its growth: every reference below the number of entries that a user finds
/// has its entry, shared page and all (VER-5, HND-3).
#[test]
fn entries_against_growth() {
    for version in [Version::V1, Version::V2] {
        every_order(move || {
            let world = Arc::new((House::default(), Home::new(DomId(1), Arc::default())));
            let table = Arc::new(Table::new(&world.0, &world.1, 2).unwrap());
            table.make_status(&world.0, &world.1, 1).unwrap();
            table.set_version(version);
            let grower = thread::spawn({
                let (table, world) = (Arc::clone(&table), Arc::clone(&world));
                move || {
                    let _admin = table.admin.lock();
                    table.grow(&world.0, &world.1, 2).unwrap();
                }
            });
            let view = table.view();
            let entries = view.entries();
            assert!(
                [1, 2]
                    .map(|frames| frames * entries_per_page(version))
                    .contains(&entries)
            );
            let last = view
                .entry_to_use(GrantRef(entries - 1))
                .expect("what counts is there");
            assert!(!last.active.load().is_pinned());
            assert_eq!(last.shared.load_head().word(), 0);
            grower.join().unwrap();
            let all = 2 * entries_per_page(version);
            assert!((0..all).all(|gref| table.view().entry_to_use(GrantRef(gref)).is_ok()));
        });
    }
}

/// Two who want an entry whose private state was never made: they get the same one, made whole, and
/// the piece that was made in vain is nobody's.
#[test]
fn first_use_against_first_use() {
    every_order(|| {
        let piece = Arc::new(Lazy::<Watched, 2>::new());
        let make = || {
            let element = Watched::default();
            element.had_alone();
            element
        };
        let other = Arc::clone(&piece);
        let thread = thread::spawn(move || {
            let element = other.get_or_make(1, make).unwrap();
            element.used();
            core::ptr::from_ref(element).addr()
        });
        let element = piece.get_or_make(1, make).unwrap();
        element.used();
        assert_eq!(thread.join().unwrap(), core::ptr::from_ref(element).addr());
    });
}

/// Two who let a table grow at once: it has as many frames as the larger one asked for.
#[test]
fn growth_against_growth() {
    every_order(|| {
        let world = Arc::new((House::default(), Home::new(DomId(1), Arc::default())));
        let table = Arc::new(Table::new(&world.0, &world.1, 3).unwrap());
        let grow = |table: &Table<_>, world: &(House, Home), frames| {
            let _admin = table.admin.lock();
            if frames > table.nr_frames() {
                table.grow(&world.0, &world.1, frames).unwrap();
            }
        };
        let grower = thread::spawn({
            let (table, world) = (Arc::clone(&table), Arc::clone(&world));
            move || grow(&table, &world, 2)
        });
        grow(&table, &world, 3);
        grower.join().unwrap();
        assert_eq!(table.nr_frames(), 3);
        assert!((0..3).all(|index| table.shared_page(index).is_some()));
    });
}
