use crate::world::World;
use gnttab_xenstore::Errno;
use gnttab_xenstore::wire::{Kind, Message, Reply};
use proptest::prelude::*;

#[test]
fn bad_messages_are_answered_like_any_other() {
    let mut w = World::new();
    let g5 = w.guest(5);
    let mut error = |kind, tx, payload: &[u8]| {
        let reply = w.raw(g5, kind, tx, payload);
        assert_eq!(
            (reply.kind(), reply.req_id(), reply.tx_id()),
            (Some(Kind::Error), 9, tx)
        );
        match Reply::parse(&reply) {
            Ok(Reply::Error(errno)) => errno,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(error(99, 0, b""), Errno::ENOSYS);
    assert_eq!(error(u32::MAX, u32::MAX, b""), Errno::ENOSYS);
    assert_eq!(error(15, 0, b"/a\0t\0"), Errno::ENOSYS, "an event from a client");
    assert_eq!(error(16, 0, b"EINVAL\0"), Errno::ENOSYS, "an error from a client");
    assert_eq!(error(2, 0, b"no end"), Errno::EINVAL);
    assert_eq!(error(2, 0, &[0xff; 4096]), Errno::EINVAL);
    assert_eq!(error(2, u32::MAX, b"/\0"), Errno::ENOENT, "no such transaction");
}

#[test]
fn the_longest_messages_fit_and_are_answered() {
    let mut w = World::new();
    let mut payload = b"/a\0".to_vec();
    payload.resize(4096, b'v');
    let reply = w.raw(w.dom0, Kind::Write.code(), 0, &payload);
    assert_eq!(Reply::parse(&reply), Ok(Reply::Ok));
    let reply = w.raw(w.dom0, Kind::Read.code(), 0, b"/a\0");
    assert_eq!(reply.payload().len(), 4093);
    let mut payload = b"/a\0".to_vec();
    payload.resize(4095, b't');
    payload.push(0);
    let reply = w.raw(w.dom0, Kind::Watch.code(), 0, &payload);
    assert_eq!(Reply::parse(&reply), Ok(Reply::Ok));
    let event = w.store.next_event(w.dom0).unwrap();
    assert_eq!(event.encode().unwrap().payload(), payload);
}

/// Payloads that are often nearly right.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        "/",
        "/a",
        "/a/b",
        "/local/domain/5",
        "device",
        "a",
        "@releaseDomain",
        "n5",
        "b6",
        "T",
        "F",
        "5",
        "6",
        "0",
        "1",
        "",
        "//",
        "tok",
    ]);
    let words = prop::collection::vec(word, 0..4).prop_map(|words| {
        words
            .iter()
            .flat_map(|word| word.bytes().chain([0]))
            .collect::<Vec<u8>>()
    });
    prop_oneof![4 => words, 1 => prop::collection::vec(any::<u8>(), 0..40)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// Whatever is sent, every message gets exactly one answer, which is one a
    /// client can read, and an unprivileged domain changes nothing of others.
    #[test]
    fn any_messages_get_one_answer_each(
        messages in prop::collection::vec((0..25_u32, 0..4_u32, payload(), any::<bool>()), 0..100),
    ) {
        let mut w = World::new();
        let (g5, g6) = (w.guest(5), w.guest(6));
        w.write(w.dom0, "/mine", "v").unwrap();
        for (kind, tx, payload, five) in messages {
            let conn = if five { g5 } else { g6 };
            let message = Message::new(kind, 3, tx, payload).unwrap();
            let outcome = w.store.handle(conn, &message).unwrap();
            prop_assert!(outcome.effects.is_empty());
            prop_assert!(Reply::parse(&outcome.reply).is_ok(), "{message} -> {}", outcome.reply);
            prop_assert_eq!((outcome.reply.req_id(), outcome.reply.tx_id()), (3, tx));
            w.events(conn);
        }
        prop_assert_eq!(w.ls(w.dom0, "/").unwrap(), ["local", "mine"]);
        prop_assert_eq!(w.read(w.dom0, "/mine").unwrap(), "v");
        w.store.release(5.into()).unwrap();
        w.store.release(6.into()).unwrap();
        prop_assert_eq!(w.store.nodes(), 4);
    }
}
