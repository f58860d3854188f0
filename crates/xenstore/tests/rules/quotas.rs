use crate::world::World;
use gnttab_xenstore::Errno::{E2BIG, ENOSPC};
use gnttab_xenstore::{DomId, Quotas};

#[test]
fn the_defaults_are_those_of_xen() {
    let q = Quotas::default();
    assert_eq!(
        (q.nodes, q.watches, q.transactions, q.node_size),
        (1000, 128, 10, 2048)
    );
}

#[test]
fn nodes_are_counted_by_owner() {
    let mut w = World::with(Quotas {
        nodes: 4,
        ..Quotas::default()
    });
    let (g5, g6) = (w.guest(5), w.guest(6));
    // With its home, that is four.
    w.write(g5, "a/b/c", "").unwrap();
    assert_eq!(w.mkdir(g5, "d"), Err(ENOSPC));
    assert_eq!(w.write(g5, "a/b/c/d", ""), Err(ENOSPC));
    w.write(g5, "a", "existing nodes can be written").unwrap();
    w.mkdir(g6, "d").unwrap();
    w.rm(g5, "a/b").unwrap();
    assert_eq!(w.mkdir(g5, "x/y/z"), Err(ENOSPC), "all or none");
    assert_eq!(w.ls(g5, "/local/domain/5").unwrap(), ["a"]);
    w.mkdir(g5, "x/y").unwrap();
}

#[test]
fn what_the_toolstack_gives_counts_but_is_not_refused() {
    let mut w = World::with(Quotas {
        nodes: 2,
        ..Quotas::default()
    });
    let g5 = w.guest(5);
    w.mkdir(w.dom0, "/local/domain/5/a/b/c").unwrap();
    assert_eq!(w.mkdir(g5, "x"), Err(ENOSPC));
    w.rm(w.dom0, "/local/domain/5/a").unwrap();
    w.mkdir(g5, "x").unwrap();
}

#[test]
fn a_node_has_a_size() {
    let mut w = World::new();
    let g5 = w.guest(5);
    // 2048 less the owner's entry.
    w.write(g5, "a", &"v".repeat(2040)).unwrap();
    assert_eq!(w.write(g5, "a", &"v".repeat(2041)), Err(ENOSPC));
    assert_eq!(w.write(g5, "b", &"v".repeat(2041)), Err(ENOSPC));
    assert_eq!(w.read(g5, "b"), Err(gnttab_xenstore::Errno::ENOENT));
    assert_eq!(w.chmod(g5, "a", "n5,r6"), Err(ENOSPC), "entries count");
    assert_eq!(w.mkdir(g5, "a/x"), Err(ENOSPC), "names of children count");
    w.write(g5, "a", &"v".repeat(2038)).unwrap();
    w.mkdir(g5, "a/x").unwrap();
    w.write(w.dom0, "/big", &"v".repeat(4000)).unwrap();
}

#[test]
fn long_names_amid_a_path_count_too() {
    let mut w = World::new();
    let g5 = w.guest(5);
    let long = format!("/local/domain/5/a/{}", "x".repeat(2100));
    assert_eq!(w.mkdir(g5, &long), Err(ENOSPC));
    assert_eq!(w.mkdir(g5, &format!("{long}/b")), Err(ENOSPC));
    assert_eq!(w.ls(g5, "/local/domain/5").unwrap(), [""; 0]);
}

#[test]
fn permissions_have_a_length() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.chmod(g5, "/local/domain/5", "n5,r1,r2,r3,r4").unwrap();
    assert_eq!(w.chmod(g5, "/local/domain/5", "n5,r1,r2,r3,r4,r6"), Err(ENOSPC));
    w.chmod(w.dom0, "/local/domain/5", "b5,r1,r2,r3,r4,r6").unwrap();
    assert_eq!(w.mkdir(g5, "x"), Err(ENOSPC), "nor are longer ones inherited");
}

#[test]
fn watches_are_counted_over_all_connections_of_a_domain() {
    let mut w = World::with(Quotas {
        watches: 3,
        ..Quotas::default()
    });
    let a = w.guest(5);
    let b = w.store.connect(DomId::new(5)).unwrap();
    w.watch(a, "x", "1").unwrap();
    w.watch(a, "x", "2").unwrap();
    w.watch(b, "x", "1").unwrap();
    assert_eq!(w.watch(a, "x", "3"), Err(E2BIG));
    assert_eq!(w.watch(b, "x", "3"), Err(E2BIG));
    w.unwatch(a, "x", "1").unwrap();
    w.watch(b, "x", "3").unwrap();
    w.store.disconnect(b);
    w.watch(a, "x", "4").unwrap();
    for i in 0..10 {
        w.watch(w.dom0, "/", &i.to_string()).unwrap();
    }
}

#[test]
fn transactions_are_counted_over_all_connections_of_a_domain() {
    let mut w = World::new();
    let a = w.guest(5);
    let b = w.store.connect(DomId::new(5)).unwrap();
    let all: Vec<_> = [a, b]
        .repeat(5)
        .into_iter()
        .map(|conn| w.begin(conn).unwrap())
        .collect();
    assert_eq!(w.begin(a).map(drop), Err(ENOSPC));
    w.end(all[0], false).unwrap();
    w.end(all[1], true).unwrap();
    w.begin(a).unwrap();
    w.begin(b).unwrap();
    assert_eq!(w.begin(b).map(drop), Err(ENOSPC));
}

#[test]
fn a_transaction_cannot_remember_without_end() {
    let mut w = World::with(Quotas {
        transaction_nodes: 20,
        ..Quotas::default()
    });
    let g5 = w.guest(5);
    let tx = w.begin(g5).unwrap();
    let reads = (0..100)
        .filter(|i| w.read(tx, &format!("n{i}")) != Err(ENOSPC))
        .count();
    assert!(reads <= 20, "{reads}");
    let tx = w.begin(g5).unwrap();
    let writes = (0..100).filter(|_| w.write(tx, "same", "v").is_ok()).count();
    assert_eq!(writes, 20);
    w.end(tx, true).unwrap();
    assert_eq!(w.read(g5, "same").unwrap(), "v");
}

#[test]
fn transactions_cannot_remember_any_number_of_bytes() {
    let mut w = World::with(Quotas {
        transaction_bytes: 10_000,
        ..Quotas::default()
    });
    let g5 = w.guest(5);
    let (a, b) = (w.begin(g5).unwrap(), w.begin(g5).unwrap());
    let value = "v".repeat(1000);
    let writes = (0..20)
        .filter(|i| w.write([a, b][i % 2], "x", &value).is_ok())
        .count();
    assert!((8..10).contains(&writes), "{writes}");
    w.end(a, false).unwrap();
    w.write(b, "x", &value).unwrap();
}
