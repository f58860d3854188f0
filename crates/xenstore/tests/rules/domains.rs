use crate::world::World;
use gnttab_xenstore::Errno::{EACCES, EINVAL, ENOENT, ENOSYS};
use gnttab_xenstore::wire::{Reply, Request};
use gnttab_xenstore::{DomId, Effect};

const D5: DomId = DomId::new(5);
const D6: DomId = DomId::new(6);

#[test]
fn the_toolstacks_requests_are_the_toolstacks() {
    let mut w = World::new();
    let g5 = w.guest(5);
    for request in [
        Request::Introduce {
            dom: D6,
            gfn: 1,
            port: 2,
        },
        Request::Release(D5),
        Request::IsDomainIntroduced(D6),
        Request::Resume(D5),
        Request::SetTarget {
            dom: D5,
            target: DomId::DOM0,
        },
        Request::Control(b"help\0".to_vec()),
    ] {
        assert_eq!(w.ask(g5, &request), Err(EACCES), "{request:?}");
    }
    assert!(w.store.is_introduced(D5) && !w.store.is_introduced(D6));
    assert_eq!(w.ask(w.dom0, &Request::Control(b"help\0".to_vec())), Err(ENOSYS));
}

#[test]
fn anybody_may_ask_where_a_home_is() {
    let mut w = World::new();
    let g5 = w.guest(5);
    for dom in [5, 999] {
        let home = format!("/local/domain/{dom}").parse().unwrap();
        let request = Request::GetDomainPath(DomId::new(dom));
        assert_eq!(w.ask(g5, &request), Ok(Reply::DomainPath(home)));
    }
}

#[test]
fn introducing_is_told_once() {
    let mut w = World::new();
    let request = Request::Introduce {
        dom: D5,
        gfn: 0xfeff,
        port: 3,
    };
    let effect = Effect::Introduced {
        dom: D5,
        gfn: 0xfeff,
        port: 3,
    };
    assert_eq!(w.effects(&request), [effect]);
    assert_eq!(w.effects(&request), []);
    w.done(w.dom0, &request).unwrap();
    let other = Request::Introduce {
        dom: D5,
        gfn: 0xfeff,
        port: 4,
    };
    assert_eq!(w.ask(w.dom0, &other), Err(EINVAL), "known with another ring");
    assert_eq!(
        w.ask(w.dom0, &Request::IsDomainIntroduced(D5)),
        Ok(Reply::Introduced(true))
    );
    assert_eq!(
        w.ask(w.dom0, &Request::IsDomainIntroduced(D6)),
        Ok(Reply::Introduced(false))
    );
    let reserved = Request::Introduce {
        dom: DomId::FIRST_RESERVED,
        gfn: 0,
        port: 0,
    };
    assert_eq!(w.ask(w.dom0, &reserved), Err(EINVAL));
    assert_eq!(w.ask(w.dom0, &Request::Resume(D5)), Ok(Reply::Ok));
    assert_eq!(w.ask(w.dom0, &Request::Resume(D6)), Err(ENOENT));
}

#[test]
fn targets_are_domains_that_there_are() {
    let mut w = World::new();
    w.guest(5);
    let set = |dom, target| Request::SetTarget { dom, target };
    assert_eq!(w.ask(w.dom0, &set(D5, D6)), Err(ENOENT));
    assert_eq!(w.ask(w.dom0, &set(D6, D5)), Err(ENOENT));
    assert_eq!(w.ask(w.dom0, &set(D5, D5)), Err(EINVAL));
}

#[test]
fn only_known_domains_connect() {
    let mut w = World::new();
    assert_eq!(w.store.connect(D5), Err(ENOENT));
    let g5 = w.guest(5);
    assert_eq!(w.store.domain_of(g5), Some(D5));
    w.store.release(D5).unwrap();
    assert_eq!(w.store.connect(D5), Err(ENOENT));
    assert_eq!(w.store.domain_of(g5), None);
}

#[test]
fn only_known_domains_other_than_the_control_domain_are_released() {
    let mut w = World::new();
    assert_eq!(w.ask(w.dom0, &Request::Release(D5)), Err(ENOENT));
    assert_eq!(w.ask(w.dom0, &Request::Release(DomId::DOM0)), Err(EINVAL));
}

#[test]
fn release_ends_connections_and_tells_which() {
    let mut w = World::new();
    let (a, g6) = (w.guest(5), w.guest(6));
    let b = w.store.connect(D5).unwrap();
    w.watch(a, "/local/domain/6", "t").unwrap();
    let tx = w.begin(b).unwrap();
    w.write(tx, "x", "v").unwrap();
    let effects = w.effects(&Request::Release(D5));
    assert_eq!(
        effects,
        [
            Effect::Disconnected(a),
            Effect::Disconnected(b),
            Effect::Released(D5)
        ]
    );
    w.write(g6, "x", "v").unwrap();
    assert_eq!(w.store.ready().count(), 0, "no watch is left");
}

/// XSA-322: what a domain had, the next one of its number has not.
#[test]
fn nothing_is_left_of_a_released_domain() {
    let mut w = World::new();
    let (g5, g6) = (w.guest(5), w.guest(6));
    w.write(g5, "device/vbd/1/state", "4").unwrap();
    w.write(g6, "shared", "v").unwrap();
    w.chmod(g6, "/local/domain/6/shared", "n6,b5,r7").unwrap();
    w.write(w.dom0, "/backend/5/state", "4").unwrap();
    w.chmod(w.dom0, "/backend/5/state", "n0,r5").unwrap();
    w.chmod(w.dom0, "@releaseDomain", "n0,r5").unwrap();
    w.watch_quietly(g6, "/local/domain/5/device/vbd/1/state", "hidden");
    w.watch_quietly(w.dom0, "/local/domain/5/device/vbd/1/state", "state");
    w.watch_quietly(w.dom0, "@releaseDomain", "gone");
    w.watch_quietly(w.dom0, "/backend", "backend");

    w.store.release(D5).unwrap();
    assert_eq!(
        w.events(w.dom0),
        ["/local/domain/5/device/vbd/1/state state", "@releaseDomain gone"],
        "peers hear that its nodes are gone before they hear that it is"
    );
    assert_eq!(w.events(g6), [""; 0], "it could not read that");
    assert_eq!(w.ls(w.dom0, "/local/domain").unwrap(), ["6"]);
    assert_eq!(w.perms(w.dom0, "/local/domain/6/shared").unwrap(), "n6,r7");
    assert_eq!(w.perms(w.dom0, "/backend/5/state").unwrap(), "n0");
    assert_eq!(w.perms(w.dom0, "@releaseDomain").unwrap(), "n0");

    w.store.introduce(D5, 0, 0).unwrap();
    let next = w.store.connect(D5).unwrap();
    for path in ["/local/domain/6/shared", "/backend/5/state", "/local/domain/5"] {
        assert_eq!(w.read(next, path), Err(EACCES), "{path}");
    }
}

#[test]
fn a_root_owned_by_a_dead_domain_goes_back_to_the_toolstack() {
    let mut w = World::new();
    w.guest(5);
    w.chmod(w.dom0, "/", "r5").unwrap();
    w.store.release(D5).unwrap();
    assert_eq!(w.perms(w.dom0, "/").unwrap(), "n0");
}

#[test]
fn a_transaction_cannot_bring_back_what_a_release_took() {
    let mut w = World::new();
    let g5 = w.guest(5);
    w.write(g5, "x", "v").unwrap();
    let tx = w.begin(w.dom0).unwrap();
    w.read(tx, "/local/domain/5/x").unwrap();
    w.write(tx, "/local/domain/5/y", "v").unwrap();
    w.store.release(D5).unwrap();
    assert_eq!(w.end(tx, true), Err(gnttab_xenstore::Errno::EAGAIN));
}

#[test]
fn domains_come_and_go_a_thousand_times_and_nothing_stays() {
    let mut w = World::new();
    for _ in 0..1000 {
        let g5 = w.guest(5);
        w.write(g5, "a/b", "v").unwrap();
        w.watch(g5, "a", "t").unwrap();
        let tx = w.begin(g5).unwrap();
        w.write(tx, "c", "v").unwrap();
        w.store.release(D5).unwrap();
    }
    assert_eq!(w.store.nodes(), 3, "/ /local /local/domain");
    assert_eq!(w.store.ready().count(), 0);
}
