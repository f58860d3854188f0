//! A store and some connections to it, in few words.

use gnttab_xenstore::path::{NodePath, Place};
use gnttab_xenstore::wire::{Message, Reply, Request, Token, TxId};
use gnttab_xenstore::{ConnId, DomId, Effect, Errno, Quotas, Store};

pub(crate) struct World {
    pub(crate) store: Store,
    pub(crate) dom0: ConnId,
}

pub(crate) type Result<T> = std::result::Result<T, Errno>;

/// Where a request is made: on a connection, perhaps in a transaction.
#[derive(Clone, Copy)]
pub(crate) struct At(pub(crate) ConnId, pub(crate) Option<TxId>);

impl From<ConnId> for At {
    fn from(conn: ConnId) -> Self {
        At(conn, None)
    }
}

pub(crate) fn node(path: &str) -> NodePath {
    path.parse().unwrap()
}

pub(crate) fn place(path: &str) -> Place {
    path.parse().unwrap()
}

impl World {
    pub(crate) fn new() -> Self {
        World::with(Quotas::default())
    }

    pub(crate) fn with(quotas: Quotas) -> Self {
        let mut store = Store::new(quotas);
        let dom0 = store.connect(DomId::DOM0).unwrap();
        World { store, dom0 }
    }

    /// A domain with a home that it owns, and a connection of it.
    pub(crate) fn guest(&mut self, id: u16) -> ConnId {
        self.store.introduce(DomId::new(id), 0, 0).unwrap();
        let home = format!("/local/domain/{id}");
        self.mkdir(self.dom0, &home).unwrap();
        self.chmod(self.dom0, &home, &format!("n{id}")).unwrap();
        self.store.connect(DomId::new(id)).unwrap()
    }

    pub(crate) fn ask(&mut self, at: impl Into<At>, request: &Request) -> Result<Reply> {
        let At(conn, tx) = at.into();
        let message = request.encode(7, tx).unwrap();
        let outcome = self.store.handle(conn, &message).unwrap();
        assert_eq!(outcome.reply.req_id(), 7);
        assert_eq!(outcome.reply.tx_id(), message.tx_id());
        match Reply::parse(&outcome.reply).unwrap() {
            Reply::Error(errno) => Err(errno),
            reply => Ok(reply),
        }
    }

    pub(crate) fn effects(&mut self, request: &Request) -> Vec<Effect> {
        self.store
            .handle(self.dom0, &request.encode(1, None).unwrap())
            .unwrap()
            .effects
    }

    /// Sends raw bytes as the payload; gives the raw answer.
    pub(crate) fn raw(&mut self, conn: ConnId, kind: u32, tx: u32, payload: &[u8]) -> Message {
        let message = Message::new(kind, 9, tx, payload.to_vec()).unwrap();
        self.store.handle(conn, &message).unwrap().reply
    }

    pub(crate) fn read(&mut self, at: impl Into<At>, path: &str) -> Result<String> {
        match self.ask(at, &Request::Read(node(path)))? {
            Reply::Value(value) => Ok(String::from_utf8(value.to_vec()).unwrap()),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn write(&mut self, at: impl Into<At>, path: &str, value: &str) -> Result<()> {
        let value = value.as_bytes().into();
        self.done(
            at,
            &Request::Write {
                path: node(path),
                value,
            },
        )
    }

    pub(crate) fn mkdir(&mut self, at: impl Into<At>, path: &str) -> Result<()> {
        self.done(at, &Request::Mkdir(node(path)))
    }

    pub(crate) fn rm(&mut self, at: impl Into<At>, path: &str) -> Result<()> {
        self.done(at, &Request::Rm(node(path)))
    }

    pub(crate) fn ls(&mut self, at: impl Into<At>, path: &str) -> Result<Vec<String>> {
        match self.ask(at, &Request::Directory(node(path)))? {
            Reply::Names(names) => Ok(names.iter().map(ToString::to_string).collect()),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn perms(&mut self, at: impl Into<At>, path: &str) -> Result<String> {
        match self.ask(at, &Request::GetPerms(place(path)))? {
            Reply::Perms(perms) => Ok(perms.to_string()),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn chmod(&mut self, at: impl Into<At>, path: &str, perms: &str) -> Result<()> {
        let perms = perms.parse().unwrap();
        self.done(
            at,
            &Request::SetPerms {
                place: place(path),
                perms,
            },
        )
    }

    pub(crate) fn watch(&mut self, conn: ConnId, path: &str, token: &str) -> Result<()> {
        let token = Token::new(token.as_bytes()).unwrap();
        self.done(
            conn,
            &Request::Watch {
                place: place(path),
                token,
            },
        )
    }

    /// Watches and takes the first event, which comes at once.
    pub(crate) fn watch_quietly(&mut self, conn: ConnId, path: &str, token: &str) {
        self.watch(conn, path, token).unwrap();
        assert_eq!(self.events(conn), [format!("{path} {token}")]);
    }

    pub(crate) fn unwatch(&mut self, conn: ConnId, path: &str, token: &str) -> Result<()> {
        let token = Token::new(token.as_bytes()).unwrap();
        self.done(
            conn,
            &Request::Unwatch {
                place: place(path),
                token,
            },
        )
    }

    pub(crate) fn begin(&mut self, conn: ConnId) -> Result<At> {
        match self.ask(conn, &Request::TransactionStart)? {
            Reply::Transaction(id) => Ok(At(conn, Some(id))),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn end(&mut self, at: At, commit: bool) -> Result<()> {
        self.done(at, &Request::TransactionEnd { commit })
    }

    pub(crate) fn done(&mut self, at: impl Into<At>, request: &Request) -> Result<()> {
        assert_eq!(self.ask(at, request)?, Reply::Ok);
        Ok(())
    }

    /// All events that wait, as "path token".
    pub(crate) fn events(&mut self, conn: ConnId) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(event) = self.store.next_event(conn) {
            event.encode().unwrap();
            all.push(format!("{} {}", event.place, event.token));
        }
        assert!(self.store.ready().all(|ready| ready != conn));
        all
    }
}
