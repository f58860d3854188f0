use crate::world::World;
use gnttab_xenstore::Errno::{EACCES, ENOENT, EPERM};
use gnttab_xenstore::wire::Request;
use gnttab_xenstore::{ConnId, DomId, Errno};

/// A node of domain 5 with these permissions for others, and domains 5 and 6.
fn world(perms: &str) -> (World, ConnId, ConnId) {
    let mut w = World::new();
    let (g5, g6) = (w.guest(5), w.guest(6));
    w.write(w.dom0, "/n/child", "c").unwrap();
    w.write(w.dom0, "/n", "v").unwrap();
    w.chmod(w.dom0, "/n", perms).unwrap();
    (w, g5, g6)
}

/// What domain 6 may do with the node: read, list, get permissions, write, create a child.
fn rights(perms: &str) -> [Result<(), Errno>; 5] {
    let (mut w, _, g6) = world(perms);
    [
        w.read(g6, "/n").map(drop),
        w.ls(g6, "/n").map(drop),
        w.perms(g6, "/n").map(drop),
        w.write(g6, "/n", "x"),
        w.mkdir(g6, "/n/new"),
    ]
}

#[test]
fn each_letter_allows_what_it_says() {
    let (yes, no) = (Ok(()), Err(EACCES));
    assert_eq!(rights("n5"), [no, no, no, no, no]);
    assert_eq!(rights("r5"), [yes, yes, yes, no, no]);
    assert_eq!(rights("w5"), [no, no, no, yes, yes]);
    assert_eq!(rights("b5"), [yes, yes, yes, yes, yes]);
    assert_eq!(
        rights("b5,n6"),
        [no, no, no, no, no],
        "an entry goes before the default"
    );
    assert_eq!(rights("n5,b6"), [yes, yes, yes, yes, yes]);
    assert_eq!(rights("n6"), [yes, yes, yes, yes, yes], "the owner");
}

#[test]
fn a_refused_request_changes_nothing() {
    let (mut w, _, g6) = world("r5");
    for result in [
        w.write(g6, "/n", "x"),
        w.write(g6, "/n/a/b", "x"),
        w.mkdir(g6, "/n/a"),
        w.rm(g6, "/n"),
        w.rm(g6, "/n/missing"),
        w.chmod(g6, "/n", "b6"),
    ] {
        assert_eq!(result, Err(EACCES));
    }
    assert_eq!(w.read(w.dom0, "/n").unwrap(), "v");
    assert_eq!(w.ls(w.dom0, "/n").unwrap(), ["child"]);
    assert_eq!(w.perms(w.dom0, "/n").unwrap(), "r5");
}

#[test]
fn rights_on_a_node_do_not_depend_on_those_above() {
    let (mut w, _, g6) = world("n5");
    w.chmod(w.dom0, "/n/child", "r5").unwrap();
    assert_eq!(w.read(g6, "/n/child").unwrap(), "c");
}

#[test]
fn a_hidden_node_and_a_missing_one_look_the_same() {
    let (mut w, _, g6) = world("n5");
    w.chmod(w.dom0, "/n/child", "n5").unwrap();
    for path in ["/n/child", "/n/missing", "/n/missing/deeper", "/missing"] {
        assert_eq!(w.read(g6, path), Err(EACCES), "{path}");
        assert_eq!(w.ls(g6, path), Err(EACCES), "{path}");
        assert_eq!(w.perms(g6, path), Err(EACCES), "{path}");
        assert_eq!(w.write(g6, path, ""), Err(EACCES), "{path}");
        assert_eq!(w.rm(g6, path), Err(EACCES), "{path}");
    }
}

#[test]
fn where_a_list_may_be_read_what_is_missing_is_missing() {
    let (mut w, _, g6) = world("r5");
    assert_eq!(w.read(g6, "/n/missing"), Err(ENOENT));
    assert_eq!(w.read(g6, "/n/missing/deeper"), Err(ENOENT));
}

#[test]
fn new_nodes_inherit_and_belong_to_their_creator() {
    let (mut w, g5, g6) = world("n5,b6,r7");
    w.write(g6, "/n/x/y", "v").unwrap();
    assert_eq!(w.perms(w.dom0, "/n/x").unwrap(), "n6,b6,r7");
    assert_eq!(w.perms(w.dom0, "/n/x/y").unwrap(), "n6,b6,r7");
    assert_eq!(w.read(g5, "/n/x"), Err(EACCES), "the owner above has no entry");
    w.mkdir(w.dom0, "/n/z").unwrap();
    assert_eq!(
        w.perms(w.dom0, "/n/z").unwrap(),
        "n5,b6,r7",
        "the toolstack keeps the owner"
    );
}

#[test]
fn permissions_are_the_owners_to_set_and_the_owner_the_toolstacks() {
    let (mut w, g5, g6) = world("b5,b6");
    assert_eq!(
        w.chmod(g6, "/n", "b5"),
        Err(EACCES),
        "not even with all other rights"
    );
    w.chmod(g5, "/n", "r5,n6").unwrap();
    assert_eq!(w.chmod(g5, "/n", "r6"), Err(EPERM));
    assert_eq!(w.perms(g5, "/n").unwrap(), "r5,n6");
    w.chmod(w.dom0, "/n", "r6").unwrap();
    assert_eq!(w.chmod(g5, "/n", "b5"), Err(EACCES), "no longer the owner");
}

#[test]
fn a_frontend_and_a_backend_write_their_own_side_only() {
    let mut w = World::new();
    let (be, fe) = (w.guest(3), w.guest(5));
    let (fe_dir, be_dir) = ("/local/domain/5/device/vbd/1", "/local/domain/3/backend/vbd/5/1");
    for (dir, perms) in [(fe_dir, "n5,r3"), (be_dir, "n3,r5")] {
        w.mkdir(w.dom0, dir).unwrap();
        w.chmod(w.dom0, dir, perms).unwrap();
        w.write(w.dom0, &format!("{dir}/state"), "1").unwrap();
    }
    let (fe_state, be_state) = (format!("{fe_dir}/state"), format!("{be_dir}/state"));
    w.write(fe, "device/vbd/1/state", "3").unwrap();
    w.write(be, "backend/vbd/5/1/state", "4").unwrap();
    assert_eq!(w.read(be, &fe_state).unwrap(), "3");
    assert_eq!(w.read(fe, &be_state).unwrap(), "4");
    assert_eq!(w.write(be, &fe_state, "6"), Err(EACCES));
    assert_eq!(w.write(fe, &be_state, "6"), Err(EACCES));
    w.write(fe, "device/vbd/1/ring-ref", "8").unwrap();
    assert_eq!(
        w.read(be, &format!("{fe_dir}/ring-ref")).unwrap(),
        "8",
        "inherited"
    );
}

#[test]
fn a_domain_that_acts_for_another_has_its_rights_until_that_one_dies() {
    let (mut w, _, g6) = world("n5");
    assert_eq!(w.read(g6, "/n"), Err(EACCES));
    let target = Request::SetTarget {
        dom: DomId::new(6),
        target: DomId::new(5),
    };
    w.done(w.dom0, &target).unwrap();
    assert_eq!(w.read(g6, "/n").unwrap(), "v");
    w.store.release(DomId::new(5)).unwrap();
    w.guest(5);
    w.write(w.dom0, "/n", "v").unwrap();
    w.chmod(w.dom0, "/n", "n5").unwrap();
    assert_eq!(w.read(g6, "/n"), Err(EACCES), "the new domain 5 has lent nothing");
}
