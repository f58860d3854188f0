//! The store against a model that is too simple to be wrong.
//!
//! The model keeps all nodes in one flat map, and a transaction in it is a
//! copy of that map. Of transactions it says what every client relies on: a
//! committed one is as if its requests had been made one after the other at
//! the moment of the commit, with the same answers (or at the start, if it has
//! changed nothing); one that was not committed has changed nothing.
#![expect(clippy::tests_outside_test_module, reason = "this whole file is tests")]

use gnttab_xenstore::path::{NodePath, Path};
use gnttab_xenstore::perms::{Access, Caller, Perms, Right};
use gnttab_xenstore::wire::{Event, Reply, Request, Token, TxId};
use gnttab_xenstore::{ConnId, DomId, Errno, Quotas, Store};
use proptest::prelude::*;
use std::collections::BTreeMap;

const QUOTAS: Quotas = Quotas {
    nodes: 6,
    node_size: 60,
    perms: 3,
    watches: 100,
    transactions: 100,
    transaction_nodes: 1000,
    transaction_bytes: 100_000,
    pending_events: 1000,
};

/// The paths that the tests use: few, so that they meet.
const PATHS: [&str; 9] = [
    "/", "/a", "/a/b", "/a/b/c", "/a/d", "/e", "/e/b", "/e/b/f", "/e/b/f/g",
];

#[derive(Clone, PartialEq, Debug)]
struct Model(BTreeMap<String, (Vec<u8>, Perms)>);

#[derive(Clone, Debug)]
enum Do {
    Read(&'static str),
    Directory(&'static str),
    GetPerms(&'static str),
    Write(&'static str, Vec<u8>),
    Mkdir(&'static str),
    Rm(&'static str),
    SetPerms(&'static str, Perms),
}

impl Do {
    fn request(&self) -> Request {
        let node = |path: &str| -> NodePath { path.parse().unwrap() };
        match self {
            Do::Read(path) => Request::Read(node(path)),
            Do::Directory(path) => Request::Directory(node(path)),
            Do::GetPerms(path) => Request::GetPerms(node(path).into()),
            Do::Write(path, value) => Request::Write {
                path: node(path),
                value: value.as_slice().into(),
            },
            Do::Mkdir(path) => Request::Mkdir(node(path)),
            Do::Rm(path) => Request::Rm(node(path)),
            Do::SetPerms(path, perms) => Request::SetPerms {
                place: node(path).into(),
                perms: perms.clone(),
            },
        }
    }

    fn path(&self) -> &'static str {
        match self {
            Do::Read(path)
            | Do::Directory(path)
            | Do::GetPerms(path)
            | Do::Write(path, _)
            | Do::Mkdir(path)
            | Do::Rm(path)
            | Do::SetPerms(path, _) => path,
        }
    }
}

impl Model {
    fn new() -> Self {
        let root = (Vec::new(), Perms::new(DomId::DOM0, Access::None));
        Model(BTreeMap::from([("/".to_owned(), root)]))
    }

    fn parent(path: &str) -> &str {
        match path.rfind('/') {
            Some(0) | None => "/",
            Some(at) => &path[..at],
        }
    }

    fn is_below(path: &str, above: &str) -> bool {
        path != above && (above == "/" || path.starts_with(&format!("{above}/")))
    }

    fn children(&self, path: &str) -> Vec<String> {
        let all = self.0.keys().filter(|at| *at != "/" && Self::parent(at) == path);
        all.map(|at| at.rsplit('/').next().unwrap().to_owned()).collect()
    }

    fn size(&self, path: &str) -> usize {
        let (value, perms) = &self.0[path];
        let names: usize = self.children(path).iter().map(|name| name.len() + 1).sum();
        value.len() + 8 * (1 + perms.entries().len()) + names
    }

    /// Does it to a copy and keeps the copy if every rule still holds.
    fn apply(&mut self, dom: DomId, what: &Do) -> Reply {
        let mut copy = self.clone();
        match copy.try_apply(Caller::new(dom), what) {
            Ok(reply) => {
                *self = copy;
                reply
            }
            Err(errno) => Reply::Error(errno),
        }
    }

    fn try_apply(&mut self, caller: Caller, what: &Do) -> Result<Reply, Errno> {
        let path = what.path();
        let right = match what {
            Do::Read(_) | Do::Directory(_) | Do::GetPerms(_) => Right::Read,
            Do::Write(..) | Do::Mkdir(_) | Do::Rm(_) => Right::Write,
            Do::SetPerms(..) => Right::Own,
        };
        let mut nearest = path;
        while !self.0.contains_key(nearest) {
            nearest = Self::parent(nearest);
        }
        if !self.0[nearest].1.allow(caller, right) {
            return Err(Errno::EACCES);
        }
        let exists = nearest == path;
        match what {
            Do::Read(_) | Do::Directory(_) | Do::GetPerms(_) | Do::SetPerms(..) if !exists => {
                return Err(Errno::ENOENT);
            }
            Do::Read(_) => return Ok(Reply::Value(self.0[path].0.as_slice().into())),
            Do::Directory(_) => {
                let names = self.children(path).into_iter();
                return Ok(Reply::Names(names.map(Into::into).collect()));
            }
            Do::GetPerms(_) => return Ok(Reply::Perms(self.0[path].1.clone())),
            Do::Rm("/") => return Err(Errno::EINVAL),
            Do::Rm(_) if !exists && nearest != Self::parent(path) => return Err(Errno::ENOENT),
            Do::Rm(_) => self.0.retain(|at, _| at != path && !Self::is_below(at, path)),
            Do::Mkdir(_) if exists => {}
            Do::Write(_, value) if exists => {
                self.0.get_mut(path).unwrap().0 = value.clone();
                self.check_size(caller, path)?;
            }
            Do::Mkdir(_) | Do::Write(..) => {
                let above = &self.0[nearest].1;
                let owner = if caller.is_privileged() {
                    above.owner()
                } else {
                    caller.dom
                };
                let mut perms = Perms::new(owner, above.others());
                for (dom, access) in above.entries() {
                    perms = perms.with(*dom, *access);
                }
                let mut made = Vec::new();
                let mut at = path;
                while at != nearest {
                    self.0.insert(at.to_owned(), (Vec::new(), perms.clone()));
                    made.push(at);
                    at = Self::parent(at);
                }
                if let Do::Write(_, value) = what {
                    self.0.get_mut(path).unwrap().0 = value.clone();
                }
                let owned = self
                    .0
                    .values()
                    .filter(|node| node.1.owner() == caller.dom)
                    .count();
                if !caller.is_privileged() && owned > QUOTAS.nodes {
                    return Err(Errno::ENOSPC);
                }
                self.check_size(caller, nearest)?;
                for path in made {
                    self.check_perms(caller, path)?;
                    self.check_size(caller, path)?;
                }
            }
            Do::SetPerms(_, perms) => {
                let node = self.0.get_mut(path).unwrap();
                if !caller.is_privileged() && perms.owner() != node.1.owner() {
                    return Err(Errno::EPERM);
                }
                node.1 = perms.clone();
                self.check_perms(caller, path)?;
                self.check_size(caller, path)?;
            }
        }
        Ok(Reply::Ok)
    }

    fn check_size(&self, caller: Caller, path: &str) -> Result<(), Errno> {
        let fits = self.size(path) <= QUOTAS.node_size;
        if caller.is_privileged() || fits {
            Ok(())
        } else {
            Err(Errno::ENOSPC)
        }
    }

    fn check_perms(&self, caller: Caller, path: &str) -> Result<(), Errno> {
        let fits = self.0[path].1.entries().len() < QUOTAS.perms;
        if caller.is_privileged() || fits {
            Ok(())
        } else {
            Err(Errno::ENOSPC)
        }
    }

    /// What a watch of `dom` on `at` may be told when the nodes became `after`
    /// by something done to `path`: whether there has to be an event.
    fn must_tell(&self, after: &Model, dom: DomId, at: &str, what: &Do) -> bool {
        let path = what.path();
        let readable = |model: &Model, path: &str| {
            model
                .0
                .get(path)
                .is_some_and(|node| node.1.allow(Caller::new(dom), Right::Read))
        };
        let covered = path == at || Self::is_below(path, at);
        let gone_below = self.0.contains_key(at) && !after.0.contains_key(at);
        let changed = self.0.get(path) != after.0.get(path) || matches!(what, Do::Write(..));
        (covered && changed && (readable(self, path) || readable(after, path)))
            || (gone_below && readable(self, at))
    }
}

fn path() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&PATHS[..])
}

fn perms() -> impl Strategy<Value = Perms> {
    let access = || prop::sample::select(&[Access::None, Access::Read, Access::Write, Access::Both][..]);
    let dom = || (0..4_u16).prop_map(DomId::new);
    (dom(), access(), prop::collection::vec((dom(), access()), 0..4)).prop_map(|(owner, others, entries)| {
        let perms = Perms::new(owner, others);
        entries
            .into_iter()
            .fold(perms, |perms, (dom, access)| perms.with(dom, access))
    })
}

fn action() -> impl Strategy<Value = Do> {
    let value = prop::collection::vec(any::<u8>(), 0..30);
    prop_oneof![
        1 => path().prop_map(Do::Read),
        1 => path().prop_map(Do::Directory),
        1 => path().prop_map(Do::GetPerms),
        3 => (path(), value).prop_map(|(path, value)| Do::Write(path, value)),
        1 => path().prop_map(Do::Mkdir),
        1 => path().prop_map(Do::Rm),
        2 => (path(), perms()).prop_map(|(path, perms)| Do::SetPerms(path, perms)),
    ]
}

struct World {
    store: Store,
    conns: Vec<ConnId>,
}

impl World {
    /// Domains 0 to 3, one connection each.
    fn new() -> Self {
        let mut store = Store::new(QUOTAS);
        let conns = (0..4).map(|id| {
            store.introduce(DomId::new(id), 0, 0).unwrap();
            store.connect(DomId::new(id)).unwrap()
        });
        World {
            conns: conns.collect(),
            store,
        }
    }

    fn ask(&mut self, who: usize, tx: Option<TxId>, request: &Request) -> Reply {
        let message = request.encode(1, tx).unwrap();
        Reply::parse(&self.store.handle(self.conns[who], &message).unwrap().reply).unwrap()
    }

    /// Everything, as the control domain sees it.
    fn everything(&mut self) -> Model {
        let mut model = BTreeMap::new();
        for path in PATHS {
            let node: NodePath = path.parse().unwrap();
            if let Reply::Value(value) = self.ask(0, None, &Request::Read(node.clone())) {
                let Reply::Perms(perms) = self.ask(0, None, &Request::GetPerms(node.into())) else {
                    panic!("{path} can be read, but not its permissions");
                };
                model.insert(path.to_owned(), (value.to_vec(), perms));
            }
        }
        assert_eq!(model.len(), self.store.nodes());
        Model(model)
    }

    fn events(&mut self, who: usize) -> Vec<Event> {
        std::iter::from_fn(|| self.store.next_event(self.conns[who])).collect()
    }
}

/// One step: who, in which of its transactions if in any, does what.
#[derive(Clone, Debug)]
enum Step {
    Do { who: usize, tx: Option<usize>, what: Do },
    Start { who: usize },
    End { who: usize, tx: usize, commit: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let tx = prop::option::of(0..3_usize);
    prop_oneof![
        12 => (0..4_usize, tx, action()).prop_map(|(who, tx, what)| Step::Do { who, tx, what }),
        2 => (0..4_usize).prop_map(|who| Step::Start { who }),
        2 => (0..4_usize, 0..3_usize, prop::bool::weighted(0.8))
            .prop_map(|(who, tx, commit)| Step::End { who, tx, commit }),
    ]
}

/// A transaction in the model: the copy it works on, what was done and what
/// was answered, whether that changed anything, and whether anybody else has
/// changed the store since its start.
struct Open {
    id: TxId,
    copy: Model,
    log: Vec<(Do, Reply)>,
    wrote: bool,
    disturbed: bool,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_store_does_what_the_model_does(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let (mut world, mut model) = (World::new(), Model::new());
        let mut open: Vec<Vec<Open>> = (0..4).map(|_| Vec::new()).collect();
        for step in steps {
            let before = model.clone();
            match step {
                Step::Do { who, tx, what } => {
                    let dom = DomId::new(u16::try_from(who).unwrap());
                    match tx {
                        Some(tx) if tx < open[who].len() => {
                            let tx = &mut open[who][tx];
                            let reply = world.ask(who, Some(tx.id), &what.request());
                            let start = tx.copy.clone();
                            prop_assert_eq!(&reply, &tx.copy.apply(dom, &what), "{:?}", what);
                            let same_again = matches!(what, Do::Write(..) | Do::SetPerms(..));
                            tx.wrote |= tx.copy != start || (reply == Reply::Ok && same_again);
                            tx.log.push((what, reply));
                        }
                        _ => {
                            let reply = world.ask(who, None, &what.request());
                            prop_assert_eq!(reply, model.apply(dom, &what), "{:?}", what);
                            if matches!(what, Do::Write(..) | Do::SetPerms(..)) {
                                // Perhaps to the same, which may count as a change.
                                open.iter_mut().flatten().for_each(|tx| tx.disturbed = true);
                            }
                        }
                    }
                }
                Step::Start { who } => {
                    let Reply::Transaction(id) = world.ask(who, None, &Request::TransactionStart)
                    else { panic!("no transaction") };
                    let copy = model.clone();
                    open[who].push(Open { id, copy, log: Vec::new(), wrote: false, disturbed: false });
                }
                Step::End { who, tx, commit } => {
                    if tx >= open[who].len() {
                        continue;
                    }
                    let tx = open[who].remove(tx);
                    let reply = world.ask(who, Some(tx.id), &Request::TransactionEnd { commit });
                    let dom = DomId::new(u16::try_from(who).unwrap());
                    match reply {
                        Reply::Ok if commit => {
                            if tx.wrote {
                                for (what, reply) in tx.log {
                                    prop_assert_eq!(model.apply(dom, &what), reply, "{:?}", what);
                                }
                                open.iter_mut().flatten().for_each(|tx| tx.disturbed = true);
                            }
                        }
                        Reply::Ok => {}
                        Reply::Error(Errno::EAGAIN | Errno::ENOSPC) => {
                            prop_assert!(commit && tx.disturbed, "a conflict with nobody");
                        }
                        other => prop_assert!(false, "{:?}", other),
                    }
                }
            }
            if model != before {
                open.iter_mut().flatten().for_each(|tx| tx.disturbed = true);
            }
        }
        prop_assert_eq!(world.everything(), model);
    }

    /// Every watch hears of what it has to, and of nothing that its owner
    /// could not have seen.
    #[test]
    fn watches_hear_what_they_must_and_nothing_they_must_not(
        watches in prop::collection::vec((1..4_usize, path()), 1..6),
        actions in prop::collection::vec((0..4_usize, action()), 1..60),
    ) {
        let (mut world, mut model) = (World::new(), Model::new());
        let watches: Vec<_> = watches.iter().enumerate().map(|(i, (who, at))| {
            let token = Token::new(i.to_string().as_bytes()).unwrap();
            let request = Request::Watch { place: at.parse().unwrap(), token: token.clone() };
            assert_eq!(world.ask(*who, None, &request), Reply::Ok);
            (*who, *at, token)
        }).collect();
        for who in 1..4 {
            world.events(who);
        }
        for (who, what) in actions {
            let before = model.clone();
            let dom = DomId::new(u16::try_from(who).unwrap());
            let reply = world.ask(who, None, &what.request());
            let done = reply == Reply::Ok;
            prop_assert_eq!(reply, model.apply(dom, &what));
            let events: Vec<_> = (0..4).map(|who| world.events(who)).collect();
            for (who, at, token) in &watches {
                let dom = DomId::new(u16::try_from(*who).unwrap());
                let mine: Vec<_> = events[*who].iter().filter(|event| event.token == *token).collect();
                if done && before.must_tell(&model, dom, at, &what) {
                    prop_assert!(!mine.is_empty(), "{:?} not told to {} at {}", what, dom, at);
                }
                for event in mine {
                    let told = event.place.as_str();
                    prop_assert!(told == *at || Model::is_below(told, at));
                    let told_path: Path = told.parse().unwrap();
                    let may_know = [&before, &model].iter().any(|model| {
                        let nodes = [Some(told_path.clone()), told_path.parent()];
                        nodes.into_iter().flatten().any(|path| {
                            model.0.get(path.as_str())
                                .is_some_and(|node| node.1.allow(Caller::new(dom), Right::Read))
                        })
                    });
                    prop_assert!(may_know, "{} told of {} after {:?}", dom, told, what);
                }
            }
        }
    }
}
