use crate::world::{At, World};
use gnttab_xenstore::Errno::{EACCES, EEXIST, ENOENT};
use gnttab_xenstore::wire::Request;
use gnttab_xenstore::{DomId, Quotas};

const NOTHING: [&str; 0] = [];

#[test]
fn a_watch_fires_once_at_once_even_where_nothing_is() {
    let mut w = World::new();
    let g5 = w.guest(5);
    for path in ["/nowhere/at/all", "device", "@releaseDomain"] {
        w.watch(g5, path, "t").unwrap();
        assert_eq!(w.events(g5), [format!("{path} t")]);
    }
}

#[test]
fn a_watch_fires_at_and_below_its_path_and_names_what_changed() {
    let mut w = World::new();
    let other = w.store.connect(DomId::DOM0).unwrap();
    w.watch_quietly(other, "/a/b", "t");
    for (path, event) in [
        ("/a/b", Some("/a/b t")),
        ("/a/b/c/d", Some("/a/b/c/d t")),
        ("/a", None),
        ("/a/bc", None),
        ("/x", None),
    ] {
        w.write(w.dom0, path, "v").unwrap();
        assert_eq!(w.events(other), event.into_iter().collect::<Vec<_>>(), "{path}");
    }
}

#[test]
fn whatever_changes_a_node_fires() {
    let mut w = World::new();
    w.watch_quietly(w.dom0, "/a", "t");
    w.mkdir(w.dom0, "/a").unwrap();
    assert_eq!(w.events(w.dom0), ["/a t"]);
    w.mkdir(w.dom0, "/a").unwrap();
    assert_eq!(w.events(w.dom0), NOTHING, "it was there already");
    w.write(w.dom0, "/a", "v").unwrap();
    assert_eq!(w.events(w.dom0), ["/a t"]);
    w.write(w.dom0, "/a", "v").unwrap();
    assert_eq!(
        w.events(w.dom0),
        ["/a t"],
        "the same value again is a write all the same"
    );
    w.chmod(w.dom0, "/a", "r0").unwrap();
    assert_eq!(w.events(w.dom0), ["/a t"]);
    w.rm(w.dom0, "/a").unwrap();
    assert_eq!(w.events(w.dom0), ["/a t"]);
    w.rm(w.dom0, "/a").unwrap();
    assert_eq!(w.events(w.dom0), NOTHING, "nothing was removed");
    assert_eq!(w.chmod(w.dom0, "/a", "r0"), Err(ENOENT));
    assert_eq!(w.events(w.dom0), NOTHING, "nothing was done");
}

#[test]
fn a_relative_watch_gets_relative_events() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.watch_quietly(g5, "device", "rel");
    w.watch_quietly(g5, "/local/domain/5/device", "abs");
    w.write(w.dom0, "/local/domain/5/device/vbd/1/state", "1")
        .unwrap();
    assert_eq!(
        w.events(g5),
        ["device/vbd/1/state rel", "/local/domain/5/device/vbd/1/state abs"]
    );
}

#[test]
fn removing_a_node_fires_watches_above_once_and_each_watch_below() {
    let mut w = World::new();
    w.write(w.dom0, "/a/b/c", "v").unwrap();
    w.write(w.dom0, "/a/b/d", "v").unwrap();
    for (path, token) in [
        ("/", "root"),
        ("/a", "a"),
        ("/a/b", "b"),
        ("/a/b/c", "c"),
        ("/a/b/none", "none"),
    ] {
        w.watch_quietly(w.dom0, path, token);
    }
    w.rm(w.dom0, "/a").unwrap();
    assert_eq!(w.events(w.dom0), ["/a root", "/a a", "/a/b b", "/a/b/c c"]);
}

#[test]
fn the_answer_to_watch_and_unwatch() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.watch_quietly(g5, "x", "t");
    assert_eq!(w.watch(g5, "x", "t"), Err(EEXIST));
    assert_eq!(
        w.watch(g5, "/local/domain/5/x", "t"),
        Err(EEXIST),
        "the same node"
    );
    w.watch_quietly(g5, "x", "u");
    w.watch_quietly(w.dom0, "/local/domain/5/x", "t");
    assert_eq!(w.unwatch(g5, "x", "v"), Err(ENOENT));
    assert_eq!(w.unwatch(g5, "y", "t"), Err(ENOENT));
    w.unwatch(g5, "x", "t").unwrap();
    assert_eq!(w.unwatch(g5, "x", "t"), Err(ENOENT));
    w.write(g5, "x", "v").unwrap();
    assert_eq!(w.events(g5), ["x u"]);
    assert_eq!(w.events(w.dom0), ["/local/domain/5/x t"], "another connection's");
}

#[test]
fn an_ended_watch_takes_its_waiting_events_with_it() {
    let mut w = World::new();
    w.watch(w.dom0, "/a", "t").unwrap();
    w.watch(w.dom0, "/a", "u").unwrap();
    w.write(w.dom0, "/a/x", "v").unwrap();
    w.unwatch(w.dom0, "/a", "t").unwrap();
    assert_eq!(w.events(w.dom0), ["/a u", "/a/x u"]);
}

#[test]
fn reset_drops_watches_events_and_transactions_of_this_connection_only() {
    let mut w = World::new();
    let other = w.store.connect(DomId::DOM0).unwrap();
    w.watch(w.dom0, "/a", "t").unwrap();
    w.watch_quietly(other, "/a", "t");
    let (mine, theirs) = (w.begin(w.dom0).unwrap(), w.begin(other).unwrap());
    w.done(w.dom0, &Request::ResetWatches).unwrap();
    w.write(w.dom0, "/a", "v").unwrap();
    assert_eq!(w.events(w.dom0), NOTHING);
    assert_eq!(w.events(other), ["/a t"]);
    assert_eq!(w.end(mine, true), Err(ENOENT));
    w.end(theirs, true).unwrap();
}

/// XSA-115: a domain must not learn of nodes it may not read.
#[test]
fn a_watch_tells_only_of_what_its_owner_may_read() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.write(w.dom0, "/secret/x", "v").unwrap();
    w.watch_quietly(g5, "/", "t");
    w.watch_quietly(g5, "/secret/x", "t");
    w.write(w.dom0, "/secret/x", "w").unwrap();
    w.write(w.dom0, "/secret/y", "w").unwrap();
    w.chmod(w.dom0, "/secret/x", "n0,w5").unwrap();
    w.rm(w.dom0, "/secret").unwrap();
    assert_eq!(w.events(g5), NOTHING);
    w.write(w.dom0, "/open", "v").unwrap();
    w.chmod(w.dom0, "/open", "r0").unwrap();
    assert_eq!(w.events(g5), ["/open t"], "from when it may be read");
    w.write(w.dom0, "/open/x", "v").unwrap();
    assert_eq!(w.events(g5), ["/open/x t"]);
}

#[test]
fn losing_the_right_to_read_is_the_last_that_is_told() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.write(w.dom0, "/n", "v").unwrap();
    w.chmod(w.dom0, "/n", "r0").unwrap();
    w.watch_quietly(g5, "/n", "t");
    w.chmod(w.dom0, "/n", "n0").unwrap();
    assert_eq!(w.events(g5), ["/n t"]);
    w.write(w.dom0, "/n", "w").unwrap();
    w.rm(w.dom0, "/n").unwrap();
    assert_eq!(w.events(g5), NOTHING);
}

#[test]
fn the_removal_of_a_readable_node_is_told_below_a_hidden_one() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.write(w.dom0, "/hidden/n", "v").unwrap();
    w.chmod(w.dom0, "/hidden/n", "r0").unwrap();
    w.watch_quietly(g5, "/hidden/n", "t");
    w.rm(w.dom0, "/hidden").unwrap();
    assert_eq!(w.events(g5), ["/hidden/n t"]);
}

#[test]
fn a_hidden_child_of_a_readable_node_is_heard_to_come_and_go_but_not_to_change() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.mkdir(w.dom0, "/dir").unwrap();
    w.chmod(w.dom0, "/dir", "r0").unwrap();
    w.watch_quietly(g5, "/dir", "t");
    let tx = w.begin(w.dom0).unwrap();
    w.write(tx, "/dir/child", "v").unwrap();
    w.chmod(tx, "/dir/child", "n0").unwrap();
    w.end(tx, true).unwrap();
    assert_eq!(w.events(g5), ["/dir/child t"], "the list of /dir may be read");
    w.write(w.dom0, "/dir/child", "w").unwrap();
    assert_eq!(w.events(g5), NOTHING);
    w.rm(w.dom0, "/dir/child").unwrap();
    assert_eq!(w.events(g5), ["/dir/child t"]);
}

#[test]
fn special_names_are_the_toolstacks_until_it_says_otherwise() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.watch_quietly(g5, "@releaseDomain", "t");
    w.watch_quietly(w.dom0, "@introduceDomain", "in");
    w.watch_quietly(w.dom0, "@releaseDomain", "out");
    w.store.introduce(DomId::new(6), 0, 0).unwrap();
    assert_eq!(w.events(w.dom0), ["@introduceDomain in"]);
    w.store.introduce(DomId::new(6), 0, 0).unwrap();
    assert_eq!(w.events(w.dom0), NOTHING, "known already");
    w.store.release(DomId::new(6)).unwrap();
    assert_eq!(w.events(w.dom0), ["@releaseDomain out"]);
    assert_eq!(w.events(g5), NOTHING);

    assert_eq!(w.perms(g5, "@releaseDomain"), Err(EACCES));
    assert_eq!(w.chmod(g5, "@releaseDomain", "r5"), Err(EACCES));
    w.chmod(w.dom0, "@releaseDomain", "n0,r5").unwrap();
    assert_eq!(w.perms(g5, "@releaseDomain").unwrap(), "n0,r5");
    w.store.introduce(DomId::new(6), 0, 0).unwrap();
    w.store.release(DomId::new(6)).unwrap();
    assert_eq!(w.events(g5), ["@releaseDomain t"]);
    w.write(w.dom0, "/releaseDomain", "v").unwrap();
    assert_eq!(w.events(g5), NOTHING, "no node is meant");
}

/// XSA-349: a peer that writes what is watched costs bounded memory, and the
/// watcher still learns that something changed.
#[test]
fn a_flood_of_changes_is_merged() {
    let mut w = World::with(Quotas {
        pending_events: 10,
        ..Quotas::default()
    });
    let g5 = w.guest(5);
    w.watch_quietly(w.dom0, "/local/domain/5", "t");
    w.watch_quietly(w.dom0, "/local/domain/5/b", "b");
    for i in 0..10_000 {
        w.write(g5, "same", "v").unwrap();
        w.mkdir(g5, &format!("n{i}")).unwrap();
        w.rm(g5, &format!("n{i}")).unwrap();
    }
    w.write(g5, "b", "v").unwrap();
    let events = w.events(w.dom0);
    assert!(events.len() <= 12, "{}", events.len());
    assert!(
        events.contains(&"/local/domain/5 t".to_owned()),
        "merged into what is watched"
    );
    assert!(
        events.contains(&"/local/domain/5/b b".to_owned()),
        "the other watch lost nothing"
    );
}

#[test]
fn an_event_too_long_for_a_message_names_what_is_watched() {
    let mut w = World::new();
    let token = "t".repeat(3000);
    w.watch_quietly(w.dom0, "/", &token);
    let long = format!("/{}", "x".repeat(2000));
    w.write(w.dom0, &long, "v").unwrap();
    assert_eq!(w.events(w.dom0), [format!("/ {token}")]);

    // Nor can a path be told as relative that is too long to be one.
    let g5 = w.guest(5);
    w.watch_quietly(g5, "a", "t");
    let long = format!("/local/domain/5/a/{}", "x".repeat(2500));
    w.write(w.dom0, &long, "v").unwrap();
    w.chmod(w.dom0, &long, "r5").unwrap();
    assert_eq!(w.events(g5), ["a t"]);
}

#[test]
fn a_connection_that_ends_takes_its_watches_with_it() {
    let mut w = World::new();
    let other = w.store.connect(DomId::DOM0).unwrap();
    w.watch(other, "/a", "t").unwrap();
    w.store.disconnect(other);
    w.store.disconnect(other);
    w.write(w.dom0, "/a", "v").unwrap();
    assert_eq!(w.store.next_event(other), None);
    assert_eq!(w.store.ready().count(), 0);
    let request = Request::Read("/a".parse().unwrap()).encode(1, None).unwrap();
    assert!(w.store.handle(At(other, None).0, &request).is_err());
}
