use crate::world::World;
use gnttab_xenstore::Errno::{EACCES, EAGAIN, EBUSY, ENOENT, ENOSPC};
use gnttab_xenstore::wire::Request;
use gnttab_xenstore::{DomId, Quotas};

const NOTHING: [&str; 0] = [];

#[test]
fn a_transaction_sees_the_start_and_itself_and_others_see_the_end() {
    let mut w = World::new();
    w.write(w.dom0, "/a", "old").unwrap();
    w.write(w.dom0, "/b", "old").unwrap();
    let tx = w.begin(w.dom0).unwrap();
    w.write(w.dom0, "/a", "new").unwrap();
    assert_eq!(w.read(tx, "/a").unwrap(), "old");
    w.write(tx, "/c/d", "mine").unwrap();
    assert_eq!(w.read(tx, "/c/d").unwrap(), "mine");
    assert_eq!(w.ls(tx, "/").unwrap(), ["a", "b", "c"]);
    assert_eq!(w.read(w.dom0, "/c/d"), Err(ENOENT));

    let tx = w.begin(w.dom0).unwrap();
    w.write(tx, "/c/d", "mine").unwrap();
    w.rm(tx, "/b").unwrap();
    w.chmod(tx, "/a", "r0").unwrap();
    w.end(tx, true).unwrap();
    assert_eq!(w.read(w.dom0, "/c/d").unwrap(), "mine");
    assert_eq!(w.read(w.dom0, "/b"), Err(ENOENT));
    assert_eq!(w.perms(w.dom0, "/a").unwrap(), "r0");
}

#[test]
fn an_aborted_transaction_leaves_nothing() {
    let mut w = World::new();
    w.watch_quietly(w.dom0, "/", "t");
    let tx = w.begin(w.dom0).unwrap();
    w.write(tx, "/a", "v").unwrap();
    w.end(tx, false).unwrap();
    assert_eq!(w.read(w.dom0, "/a"), Err(ENOENT));
    assert_eq!(w.events(w.dom0), NOTHING);
}

#[test]
fn numbers_that_are_no_open_transaction_are_refused() {
    let mut w = World::new();
    let other = w.store.connect(DomId::DOM0).unwrap();
    let tx = w.begin(w.dom0).unwrap();
    assert_eq!(
        w.ask(tx, &Request::TransactionStart),
        Err(EBUSY),
        "none within another"
    );
    let stolen = crate::world::At(other, tx.1);
    assert_eq!(w.read(stolen, "/"), Err(ENOENT), "of another connection");
    assert_eq!(w.end(stolen, true), Err(ENOENT));
    w.end(tx, true).unwrap();
    assert_eq!(w.read(tx, "/"), Err(ENOENT), "ended");
    assert_eq!(w.write(tx, "/a", ""), Err(ENOENT));
    assert_eq!(w.end(tx, true), Err(ENOENT));
    assert_eq!(w.end(w.dom0.into(), true), Err(ENOENT), "none at all");
}

/// What another does while a transaction has done something, and whether the
/// transaction may then be committed.
#[test]
fn a_conflict_is_a_change_of_what_the_transaction_used() {
    let prepare = |w: &mut World| {
        for path in ["/a", "/b/x", "/c/y"] {
            w.write(w.dom0, path, "v").unwrap();
        }
    };
    type Step = fn(&mut World, crate::world::At);
    let steps: [(&str, Step); 11] = [
        ("read /a", |w, at| drop(w.read(at, "/a"))),
        ("write /a", |w, at| w.write(at, "/a", "w").unwrap()),
        ("write /b/x", |w, at| w.write(at, "/b/x", "w").unwrap()),
        ("create /b/n", |w, at| w.mkdir(at, "/b/n").unwrap()),
        ("create /b/m", |w, at| w.mkdir(at, "/b/m").unwrap()),
        ("list /b", |w, at| drop(w.ls(at, "/b"))),
        ("rm /b/x", |w, at| w.rm(at, "/b/x").unwrap()),
        ("rm /b", |w, at| w.rm(at, "/b").unwrap()),
        ("chmod /b", |w, at| w.chmod(at, "/b", "r0").unwrap()),
        ("read /b/n, missing", |w, at| {
            assert_eq!(w.read(at, "/b/n"), Err(ENOENT))
        }),
        ("write /c/y", |w, at| w.write(at, "/c/y", "w").unwrap()),
    ];
    let conflicts = |mine: &str, theirs: &str| match (mine, theirs) {
        (_, "read /a" | "list /b" | "read /b/n, missing") => false,
        ("read /a" | "write /a", "write /a") => true,
        ("write /b/x" | "rm /b/x", "write /b/x" | "rm /b/x" | "rm /b") => true,
        ("create /b/n" | "read /b/n, missing", "create /b/n" | "rm /b" | "chmod /b") => true,
        ("create /b/m", "create /b/m" | "rm /b" | "chmod /b") => true,
        ("list /b", "create /b/n" | "create /b/m" | "rm /b/x" | "rm /b" | "chmod /b") => true,
        ("rm /b" | "chmod /b", "rm /b" | "chmod /b") => true,
        ("write /c/y", "write /c/y") => true,
        _ => false,
    };
    for (mine, my_step) in steps {
        for (theirs, their_step) in steps {
            let mut w = World::new();
            prepare(&mut w);
            let tx = w.begin(w.dom0).unwrap();
            my_step(&mut w, tx);
            // So that there is something to commit, whatever the step.
            w.write(tx, "/mark", "").unwrap();
            let outside = w.dom0.into();
            their_step(&mut w, outside);
            let expected = if conflicts(mine, theirs) {
                Err(EAGAIN)
            } else {
                Ok(())
            };
            assert_eq!(w.end(tx, true), expected, "{mine}, then {theirs} by another");
            let marked = w.read(w.dom0, "/mark").is_ok();
            assert_eq!(marked, expected.is_ok(), "all or nothing");
        }
    }
}

#[test]
fn a_node_removed_and_made_again_is_another() {
    let mut w = World::new();
    w.write(w.dom0, "/a", "v").unwrap();
    let tx = w.begin(w.dom0).unwrap();
    w.read(tx, "/a").unwrap();
    w.write(tx, "/b", "v").unwrap();
    w.rm(w.dom0, "/a").unwrap();
    w.write(w.dom0, "/a", "v").unwrap();
    assert_eq!(w.end(tx, true), Err(EAGAIN));
}

/// So that no flood of writes can keep a reader from ever coming to an end.
#[test]
fn a_transaction_that_only_read_never_conflicts() {
    let mut w = World::new();
    w.write(w.dom0, "/a", "1").unwrap();
    let tx = w.begin(w.dom0).unwrap();
    assert_eq!(w.read(tx, "/a").unwrap(), "1");
    w.write(w.dom0, "/a", "2").unwrap();
    assert_eq!(w.read(tx, "/a").unwrap(), "1");
    w.end(tx, true).unwrap();
}

/// Writers of different nodes do not get into each other's way.
#[test]
fn another_domains_writes_do_not_starve_a_transaction() {
    let mut w = World::new();
    let (g5, g6) = (w.guest(5), w.guest(6));
    let tx = w.begin(g5).unwrap();
    w.read(tx, "x").unwrap_err();
    for i in 0..100 {
        w.write(g6, &format!("n{i}"), "v").unwrap();
    }
    w.write(tx, "x", "v").unwrap();
    w.end(tx, true).unwrap();
}

#[test]
fn two_transactions_on_one_node_one_wins() {
    let mut w = World::new();
    w.write(w.dom0, "/counter", "0").unwrap();
    let (a, b) = (w.begin(w.dom0).unwrap(), w.begin(w.dom0).unwrap());
    for tx in [a, b] {
        let value: u32 = w.read(tx, "/counter").unwrap().parse().unwrap();
        w.write(tx, "/counter", &(value + 1).to_string()).unwrap();
    }
    w.end(b, true).unwrap();
    assert_eq!(w.end(a, true), Err(EAGAIN));
    assert_eq!(w.read(w.dom0, "/counter").unwrap(), "1");
}

#[test]
fn events_fire_at_commit_once_a_node_and_not_for_what_came_to_nothing() {
    let mut w = World::new();
    let other = w.store.connect(DomId::DOM0).unwrap();
    w.write(w.dom0, "/gone/x", "v").unwrap();
    w.watch_quietly(other, "/", "t");
    w.watch_quietly(other, "/gone/x", "x");
    let tx = w.begin(w.dom0).unwrap();
    w.write(tx, "/b", "1").unwrap();
    w.write(tx, "/a", "1").unwrap();
    w.write(tx, "/b", "2").unwrap();
    w.mkdir(tx, "/temporary").unwrap();
    w.rm(tx, "/temporary").unwrap();
    w.rm(tx, "/gone").unwrap();
    assert_eq!(w.events(other), NOTHING);
    w.end(tx, true).unwrap();
    assert_eq!(w.events(other), ["/b t", "/a t", "/gone t", "/gone/x x"]);
}

#[test]
fn a_conflict_fires_nothing() {
    let mut w = World::new();
    let tx = w.begin(w.dom0).unwrap();
    w.write(tx, "/a", "1").unwrap();
    w.write(w.dom0, "/a", "2").unwrap();
    w.watch_quietly(w.dom0, "/", "t");
    assert_eq!(w.end(tx, true), Err(EAGAIN));
    assert_eq!(w.events(w.dom0), NOTHING);
    assert_eq!(w.read(w.dom0, "/a").unwrap(), "2");
}

#[test]
fn permissions_hold_in_a_transaction_and_what_it_hid_at_once_is_never_seen() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.write(w.dom0, "/n", "v").unwrap();
    let tx = w.begin(g5).unwrap();
    assert_eq!(w.read(tx, "/n"), Err(EACCES));
    assert_eq!(w.write(tx, "/n", ""), Err(EACCES));
    w.end(tx, true).unwrap();

    // Created readable and hidden before the commit: there was no moment at
    // which domain 5 could have read it.
    w.mkdir(w.dom0, "/dir").unwrap();
    w.watch_quietly(g5, "/dir", "t");
    let tx = w.begin(w.dom0).unwrap();
    w.mkdir(tx, "/dir/child").unwrap();
    w.chmod(tx, "/dir/child", "r0").unwrap();
    w.write(tx, "/dir/child", "v").unwrap();
    w.chmod(tx, "/dir/child", "n0").unwrap();
    w.end(tx, true).unwrap();
    assert_eq!(w.events(g5), NOTHING);
}

#[test]
fn a_right_lost_meanwhile_is_a_conflict() {
    let mut w = World::new();
    let g5 = w.guest(5);
    let tx = w.begin(g5).unwrap();
    w.write(tx, "x", "v").unwrap();
    w.chmod(w.dom0, "/local/domain/5", "n0").unwrap();
    assert_eq!(w.end(tx, true), Err(EAGAIN));
    assert_eq!(w.read(w.dom0, "/local/domain/5/x"), Err(ENOENT));
}

#[test]
fn room_used_up_meanwhile_is_told_and_nothing_is_left() {
    let mut w = World::with(Quotas {
        nodes: 3,
        ..Quotas::default()
    });
    let g5 = w.guest(5);
    let tx = w.begin(g5).unwrap();
    w.write(tx, "a", "v").unwrap();
    w.write(tx, "b", "v").unwrap();
    w.write(g5, "c", "v").unwrap();
    assert_eq!(w.end(tx, true), Err(ENOSPC));
    assert_eq!(w.ls(g5, "/local/domain/5").unwrap(), ["c"]);
}

#[test]
fn a_connection_may_have_several_and_their_end_is_its_own() {
    let mut w = World::new();
    let (a, b) = (w.begin(w.dom0).unwrap(), w.begin(w.dom0).unwrap());
    w.write(a, "/a", "v").unwrap();
    w.write(b, "/b", "v").unwrap();
    assert_eq!(w.read(a, "/b"), Err(ENOENT));
    w.end(a, true).unwrap();
    w.end(b, true).unwrap();
    assert_eq!(w.ls(w.dom0, "/").unwrap(), ["a", "b"]);
}
