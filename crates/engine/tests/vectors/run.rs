//! Runs the steps of a vector.
//!
//! Everything goes through the raw door, with arguments laid out in guest memory for the caller's
//! ABI. Beside what a step says, each call is held to this: no field changes that is not an
//! answer, no padding changes (but where the whole structure is written back), an item without a
//! result is not written, and no byte of any frame changes that no copy was to change.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use gnttab_abi::*;
use gnttab_engine::{DomainKind, Reference};

use crate::rig::{ARGUMENTS, LIST, Place, Protection, Rig};
use crate::script::{Action, Call, Script, Step, Vector, Write};

/// What a failed step says.
pub(crate) type Outcome = Result<(), String>;

/// Bytes of a vCPU's arguments, and where in them the part begins that a step takes away.
const PER_VCPU: u64 = 8 * 4096;
const EDGE: u64 = 4 * 4096;
/// What an answer's place holds before the call.
const UNWRITTEN: GrantStatus = GrantStatus(0x7777);
const UNTOUCHED: u8 = 0xCC;
const NO_HANDLE: GrantHandle = GrantHandle(99);
const NO_BUS: u64 = 0x9999_9999_9999_9999;

thread_local! {
    /// The vector that runs on this thread, for the places in the engine that steps wait for.
    static RUNNING: RefCell<Option<Rc<Runner>>> = const { RefCell::new(None) };
}

/// Tells the vector that the engine got to a place.
pub(crate) fn reached(place: &str) {
    let runner = RUNNING.with_borrow(Clone::clone);
    if let Some(runner) = runner {
        runner.reached(place);
    }
}

/// One case of a vector: the caller's kind, the table's version, whose behaviour.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) kind: DomainKind,
    pub(crate) version: u32,
    pub(crate) reference: Reference,
    pub(crate) abi: Abi,
    /// Whether every batch is broken off before each item.
    pub(crate) eager: bool,
}

/// A mapping that a step made and named.
#[derive(Clone, Copy)]
struct Named {
    handle: GrantHandle,
    addr: u64,
}

/// A step that waits, and how often it still will happen.
struct Waiting {
    place: String,
    times: u32,
    step: Step,
}

/// A vector while it runs.
struct Runner {
    rig: Rig,
    case: Case,
    names: RefCell<BTreeMap<String, Named>>,
    /// Places used so far, for mappings that say none.
    places: Cell<usize>,
    waiting: RefCell<Vec<Waiting>>,
    /// How many calls the step that runs now is within.
    inside: Cell<u32>,
    /// What went wrong in a step that waited.
    faults: RefCell<Vec<String>>,
    /// What every frame must hold.
    contents: RefCell<BTreeMap<Mfn, Vec<u8>>>,
}

/// Runs one case of a vector; what is wrong, with the step that showed it.
pub(crate) fn run(script: &Script, vector: &Vector, case: Case) -> Outcome {
    let runner = Rc::new(Runner {
        rig: Rig::new(script.table, vector, case)?,
        case,
        names: RefCell::default(),
        places: Cell::new(0),
        waiting: RefCell::default(),
        inside: Cell::new(0),
        faults: RefCell::default(),
        contents: RefCell::default(),
    });
    *runner.contents.borrow_mut() = runner.rig.contents();
    RUNNING.set(Some(Rc::clone(&runner)));
    let scene = script
        .scene
        .iter()
        .filter(|_| vector.holds.setting("bare").is_none());
    let outcome = scene.chain(&vector.steps).try_for_each(|step| {
        let at = |what| format!("line {}: {}: {what}", step.line, step.text);
        runner.step(step).map_err(at)
    });
    RUNNING.set(None);
    outcome?;
    runner.nothing_left_waiting()?;
    runner.rig.settle().map_err(|what| format!("after it: {what}"))
}

impl Runner {
    fn step(&self, step: &Step) -> Outcome {
        if let Some((place, times)) = &step.on {
            self.waiting.borrow_mut().push(Waiting {
                place: place.clone(),
                times: *times,
                step: Step {
                    on: None,
                    ..step.clone()
                },
            });
            return Ok(());
        }
        match &step.action {
            Action::Call(call) => self.call(step.actor, call)?,
            Action::Entry {
                table,
                refs,
                field,
                write,
                values,
            } => {
                for gref in refs.clone() {
                    self.entry(*table, GrantRef(gref), field, *write, values)
                        .map_err(|why| format!("{table}[{gref}]: {why}"))?;
                }
            }
            Action::World { words, is } => self.world(words, is)?,
        }
        match self.faults.borrow_mut().drain(..).next() {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    /// Does what waits for a place.
    fn reached(&self, place: &str) {
        let due: Vec<Step> = {
            let mut waiting = self.waiting.borrow_mut();
            let here = waiting
                .iter_mut()
                .filter(|waiting| waiting.place == place && waiting.times > 0);
            let due = here.map(|waiting| {
                waiting.times -= 1;
                waiting.step.clone()
            });
            due.collect()
        };
        self.inside.set(self.inside.get() + 1);
        for step in due {
            if let Err(why) = self.step(&step) {
                self.faults
                    .borrow_mut()
                    .push(format!("on {place}, line {}: {}: {why}", step.line, step.text));
            }
        }
        self.inside.set(self.inside.get() - 1);
    }

    fn nothing_left_waiting(&self) -> Outcome {
        let waiting = self.waiting.borrow();
        match waiting.iter().find(|waiting| waiting.times > 0) {
            Some(left) => Err(format!(
                "line {}: the engine never got to {}",
                left.step.line, left.place
            )),
            None => Ok(()),
        }
    }

    // --- words ----------------------------------------------------------------------------------

    fn domain(&self, word: &str) -> Result<DomId, String> {
        Ok(match word {
            "SELF" => DomId::SELF,
            "P" | "G" | "C" | "T" => id_of(word.chars().next().unwrap_or_default()),
            _ => DomId(
                number(word)?
                    .try_into()
                    .map_err(|_| format!("{word} is no domain"))?,
            ),
        })
    }

    /// `1/5`.
    fn grant(&self, word: &str) -> Result<(DomId, GrantRef), String> {
        let (domain, gref) = word
            .split_once('/')
            .ok_or(format!("{word} is no domain/reference"))?;
        Ok((self.domain(domain)?, gref_of(gref)?))
    }

    /// A guest address of `actor`: see the README's places.
    fn place(&self, actor: char, word: &str) -> Result<u64, String> {
        let (base, offset) = match word.split_once('+') {
            Some((base, offset)) => (base, number(offset)?),
            None => (word, 0),
        };
        let address = match base.split_once(':') {
            Some(("pte", place)) => self.rig.pte_address(actor, self.place(actor, place)?),
            Some(("ma", frame)) => self.rig.frame(actor, frame)?.address(),
            Some(("ram", frame)) => self.rig.at_first(frame)?.address(),
            Some(("gfn", gfn)) => Gfn(number(gfn)?).address(),
            Some(_) => return Err(format!("{word} is no place")),
            None => match base {
                "X" => self.rig.place(actor, Place::Free(0)),
                "Y" => self.rig.place(actor, Place::Free(1)),
                "Z" => self.rig.place(actor, Place::Free(2)),
                "A" => self.rig.place(actor, Place::Free(3)),
                "B" => self.rig.place(actor, Place::Free(4)),
                "nol1" => self.rig.place(actor, Place::NoTable),
                "huge" => self.rig.place(actor, Place::Huge),
                _ => number(base)?,
            },
        };
        Ok(address.wrapping_add(offset))
    }

    /// A place for a mapping that says none.
    fn fresh_place(&self, actor: char) -> u64 {
        let used = self.places.get();
        self.places.set(used + 1);
        self.rig.place(actor, Place::Free(8 + used))
    }

    /// A frame's number as `owner`'s table has it.
    fn frame_number(&self, owner: char, word: &str) -> Result<u64, String> {
        if let Some(raw) = word.strip_prefix('#') {
            return number(raw);
        }
        if let "A" | "B" = word {
            return Ok(Gfn::containing(self.place(owner, word)?).0);
        }
        let frame = self.rig.frame(owner, word)?;
        Ok(self.rig.gfn_of(owner, frame)?.0)
    }

    fn named(&self, word: &str) -> Result<Named, String> {
        self.names
            .borrow()
            .get(word)
            .copied()
            .ok_or(format!("no mapping is called {word}"))
    }

    fn handle(&self, word: &str) -> Result<GrantHandle, String> {
        if word == "free" {
            // One that exists, since a page of handles does, and that nobody holds.
            let names = self.names.borrow();
            let held = |handle: &GrantHandle| names.values().any(|named| named.handle == *handle);
            return Ok((0..255)
                .map(GrantHandle)
                .find(|handle| !held(handle))
                .unwrap_or(NO_HANDLE));
        }
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(GrantHandle(narrow(number(word)?)?));
        }
        Ok(self.named(word)?.handle)
    }

    // --- entries --------------------------------------------------------------------------------

    fn entry(&self, table: char, gref: GrantRef, field: &str, write: Write, values: &[String]) -> Outcome {
        if write == Write::Flip {
            let by = number(&values[0])?;
            let mut words = self.rig.entry(table, gref)?;
            match field {
                "flags" => words.head.flags ^= EntryFlags::from_bits_retain(short(by)?),
                "domid" => words.head.domid.0 ^= short(by)?,
                _ => return Err(format!("{field} cannot be flipped")),
            }
            return self.rig.set_head(table, gref, words.head);
        }
        let set = write == Write::Set;
        match (field, values) {
            ("flags", [value]) => {
                let flags = EntryFlags::from_bits_retain(short(number(value)?)?);
                let entry = self.rig.entry(table, gref)?;
                match set {
                    true => self.rig.set_head(table, gref, EntryHead { flags, ..entry.head }),
                    false => same("flags", entry.head.flags, flags),
                }
            }
            ("domid", [value]) => {
                let domid = self.domain(value)?;
                let entry = self.rig.entry(table, gref)?;
                match set {
                    true => self.rig.set_head(table, gref, EntryHead { domid, ..entry.head }),
                    false => same("domid", entry.head.domid, domid),
                }
            }
            ("frame", [value]) => {
                let frame = self.frame_number(table, value)?;
                match set {
                    true => self.rig.set_frame(table, gref, frame),
                    false => same("frame", Gfn(self.rig.entry(table, gref)?.frame), Gfn(frame)),
                }
            }
            ("status", [value]) => {
                let status = short(number(value)?)?;
                match set {
                    true => self.rig.set_status(table, gref, status),
                    false => same("status word", self.rig.status(table, gref)?, status),
                }
            }
            // Flags and, in version 2, the marks beside them.
            ("", [value]) if !set => {
                let mut flags = self.rig.entry(table, gref)?.head.flags;
                if self.rig.version(table) == 2 {
                    flags |= EntryFlags::from_bits_retain(self.rig.status(table, gref)?) & EntryFlags::IN_USE;
                }
                same(
                    "flags",
                    flags,
                    EntryFlags::from_bits_retain(short(number(value)?)?),
                )
            }
            ("", values) => {
                let (wanted, marks) = self.whole_entry(table, values)?;
                if set {
                    return self.rig.set_entry(table, gref, wanted);
                }
                same("entry", self.rig.entry(table, gref)?, wanted)?;
                match self.rig.version(table) {
                    2 => same("status word", self.rig.status(table, gref)? & 0x18, marks),
                    _ => Ok(()),
                }
            }
            _ => Err(format!("what is {field} {values:?}")),
        }
    }

    /// `FLAGS DOM FRAME [OFF+LEN]` or `FLAGS DOM via D/REF`. In version 2 what the flags say of
    /// use is apart, in the status word.
    fn whole_entry(&self, table: char, values: &[String]) -> Result<(EntryV2, u16), String> {
        let [flags, domid, rest @ ..] = values else {
            return Err(format!("{values:?} is no entry"));
        };
        let mut flags = EntryFlags::from_bits_retain(short(number(flags)?)?);
        let mut marks = EntryFlags::empty();
        if self.rig.version(table) == 2 {
            marks = flags & EntryFlags::IN_USE;
            flags -= EntryFlags::IN_USE;
        }
        let head = EntryHead {
            flags,
            domid: self.domain(domid)?,
        };
        let body = match rest {
            [via, grant] if via == "via" => {
                let (trans_domid, gref) = self.grant(grant)?;
                EntryBodyV2::Transitive { trans_domid, gref }
            }
            [frame, part] => {
                let (page_off, length) = part.split_once('+').ok_or(format!("{part} is no part"))?;
                EntryBodyV2::SubPage {
                    page_off: short(number(page_off)?)?,
                    length: short(number(length)?)?,
                    frame: self.frame_number(table, frame)?,
                }
            }
            [frame] => EntryBodyV2::FullPage {
                frame: self.frame_number(table, frame)?,
            },
            _ => return Err(format!("{values:?} is no entry")),
        };
        Ok((EntryV2::new(head, body), marks.bits()))
    }

    // --- calls ----------------------------------------------------------------------------------

    fn call(&self, actor: (char, usize), call: &Call) -> Outcome {
        match call.verb.as_str() {
            "call" => self.bare_call(actor, call),
            "physmap" | "acquire" => self.memory_op(actor, call),
            "create" => self
                .rig
                .create(self.case, &call.items[0], &call.results, &call.rc),
            "map" => self.map(actor, call),
            "unmap" => self.unmap(actor, call),
            "replace" => self.replace(actor, call),
            "setup" => self.setup(actor, call),
            "status_frames" => self.status_frames(actor, call),
            "transfer" => self.transfer(actor, call),
            "copy" => self.copy(actor, call),
            "query" => self.query(actor, call),
            "setver" => self.set_version(actor, call),
            "getver" => self.get_version(actor, call),
            "swap" => self.swap(actor, call),
            "flush" => self.flush(actor, call),
            "dump" => self.dump(actor, call),
            other => Err(format!("no call is named {other}")),
        }
    }

    /// A call that only the door looks at.
    fn bare_call(&self, actor: (char, usize), call: &Call) -> Outcome {
        let (op, words) = call.items[0].split_first().ok_or("which operation")?;
        let mut registers = [u64::from(op_of(op)?.number()), ARGUMENTS, 1];
        for word in words {
            let (name, value) = word.split_once('=').ok_or(format!("what is {word}"))?;
            let place = ["cmd", "ptr", "count"].iter().position(|known| *known == name);
            registers[place.ok_or(format!("what is {name}"))?] = number(value)?;
        }
        let rc = self.rig.hypercall(actor, self.rig.abi_of(actor.0), registers);
        self.same_rc(rc, &call.rc)
    }

    /// Lays the items out, makes the hypercall and reads them back. `answers` are the fields that
    /// it may write.
    fn batch<T: Argument>(
        &self,
        actor: (char, usize),
        call: &Call,
        items: &[T],
        answers: &[&str],
    ) -> Result<Vec<Option<T>>, String> {
        let abi = self.rig.abi_of(actor.0);
        let size = T::size(abi);
        let mut images = Vec::new();
        for item in items {
            let mut image = vec![UNTOUCHED; size];
            item.encode(abi, &mut image).map_err(|error| error.to_string())?;
            images.push(image);
        }
        let index = |name| {
            call.option(name)
                .map(|at| at.parse::<usize>().map_err(|_| format!("@{name}:{at}")))
        };
        let (gone, readonly) = (index("nomap").transpose()?, index("ro").transpose()?);
        let area = ARGUMENTS + u64::try_from(actor.1).map_err(|error| error.to_string())? * PER_VCPU;
        let edge = area + EDGE;
        let base = match gone.or(readonly) {
            Some(at) => edge - u64::try_from(at * size).map_err(|error| error.to_string())?,
            None => area,
        };
        let address = |index: usize| base + u64::try_from(index * size).unwrap_or_default();
        for (index, image) in images.iter().enumerate() {
            self.rig.write_guest(actor.0, address(index), image);
        }
        self.rig
            .expect_statuses(actor.0, base, size, T::status_offset(abi), items.len());
        let protect = |protection| self.rig.protect(actor.0, edge, PER_VCPU - EDGE, protection);
        if gone.is_some() {
            protect(Protection::Unmapped);
        } else if readonly.is_some() {
            protect(Protection::ReadOnly);
        }
        let register = |name: &str, default: u64| call.option(name).map_or(Ok(default), number);
        let count = u64::try_from(items.len()).map_err(|error| error.to_string())?;
        let registers = [
            register("cmd", u64::from(T::OP.number()))?,
            register("ptr", base)?,
            register("count", count)?,
        ];
        let rc = self.rig.hypercall(actor, abi, registers);
        protect(Protection::Open);
        self.same_rc(rc, &call.rc)?;

        let mut read = Vec::new();
        for (index, image) in images.iter().enumerate() {
            let mut now = vec![0; size];
            self.rig.read_guest(actor.0, address(index), &mut now);
            let mut padding = vec![true; size];
            for (field, offset, length) in T::fields(abi) {
                let bytes = *offset..offset + length;
                padding[bytes.clone()].fill(false);
                if !answers.contains(field) && now[bytes.clone()] != image[bytes] {
                    return Err(format!("item {index}: its {field} was changed"));
                }
            }
            let changed = |at: &usize| padding[*at] && now[*at] != UNTOUCHED;
            if !T::WHOLE && (0..size).any(|at| changed(&at)) {
                return Err(format!("item {index}: its padding was changed"));
            }
            let unreadable = gone.is_some_and(|gone| index >= gone);
            read.push(if unreadable {
                None
            } else {
                Some(T::decode(abi, &now).map_err(|error| error.to_string())?)
            });
        }
        if self.inside.get() == 0 {
            self.frames_hold_what_they_must()?;
        }
        Ok(read)
    }

    fn same_rc(&self, got: i64, wanted: &str) -> Outcome {
        let wanted = match wanted.strip_prefix('-') {
            Some(name) => {
                let known = Errno::ALL.iter().find(|errno| errno.name() == name);
                known.ok_or(format!("what is {name}"))?.hypercall_result()
            }
            None => wanted.parse().map_err(|_| format!("{wanted} is no result"))?,
        };
        if got == wanted {
            return Ok(());
        }
        let name = |rc: i64| {
            let errno = u16::try_from(-rc).ok().and_then(Errno::from_number);
            errno.map_or(rc.to_string(), |errno| errno.to_string())
        };
        Err(format!("returned {}, not {}", name(got), name(wanted)))
    }

    /// Goes through the items and the results that the step says for them: a single result
    /// is that of all, an item without one must be unwritten.
    fn results<T>(
        call: &Call,
        read: &[Option<T>],
        status: impl Fn(&T) -> GrantStatus,
        mut okay: impl FnMut(usize, &T, &[String]) -> Outcome,
    ) -> Outcome {
        for (index, item) in read.iter().enumerate() {
            let Some(item) = item else { continue };
            let unwritten = ["unwritten".to_owned()];
            let wanted: &[String] = match call.results.as_slice() {
                [all] if read.len() > 1 => all,
                list => list.get(index).map_or(&unwritten[..], Vec::as_slice),
            };
            let (name, rest) = wanted.split_first().ok_or("no result")?;
            let got = status(item);
            let wanted = status_of(name)?;
            if got != wanted {
                return Err(format!("item {index}: {got:?}, not {name}"));
            }
            okay(index, item, rest).map_err(|why| format!("item {index}: {why}"))?;
        }
        Ok(())
    }

    fn map(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [grant, flags, place @ ..] = words.as_slice() else {
                return Err(format!("{words:?} is no mapping"));
            };
            let (dom, gref) = self.grant(grant)?;
            items.push(MapGrantRef {
                host_addr: match place {
                    [place] => self.place(actor.0, place)?,
                    _ => self.fresh_place(actor.0),
                },
                flags: map_flags(flags)?,
                gref,
                dom,
                status: UNWRITTEN,
                handle: NO_HANDLE,
                dev_bus_addr: NO_BUS,
            });
        }
        let read = self.batch(actor, call, &items, &["status", "handle", "dev_bus_addr"])?;
        let many = items.len() > 1 && call.results.len() == 1;
        Self::results(
            call,
            &read,
            |item| item.status,
            |index, item, words| {
                if item.status != GrantStatus::OKAY {
                    same("handle", item.handle, NO_HANDLE)?;
                    return same("dev_bus_addr", item.dev_bus_addr, NO_BUS);
                }
                for word in words {
                    if let Some(frame) = word.strip_prefix("bus=") {
                        same(
                            "dev_bus_addr",
                            item.dev_bus_addr,
                            self.rig.frame('G', frame)?.address(),
                        )?;
                    } else {
                        let name = if many {
                            format!("{word}{index}")
                        } else {
                            word.clone()
                        };
                        self.name(
                            name,
                            Named {
                                handle: item.handle,
                                addr: items[index].host_addr,
                            },
                        );
                    }
                }
                Ok(())
            },
        )
    }

    /// Names a mapping. A handle that is handed out again has lost its older names.
    fn name(&self, name: String, named: Named) {
        let mut names = self.names.borrow_mut();
        names.retain(|_, older| older.handle != named.handle);
        names.insert(name, named);
    }

    fn unmap(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [place, bus, handle] = words.as_slice() else {
                return Err(format!("{words:?} is no unmap"));
            };
            items.push(UnmapGrantRef {
                host_addr: match place.as_str() {
                    "@" => self.named(handle)?.addr,
                    _ => self.place(actor.0, place)?,
                },
                dev_bus_addr: self.place(actor.0, bus)?,
                handle: self.handle(handle)?,
                status: UNWRITTEN,
            });
        }
        let read = self.batch(actor, call, &items, &["status"])?;
        Self::results(call, &read, |item| item.status, |_, _, _| Ok(()))
    }

    fn replace(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [place, new, handle] = words.as_slice() else {
                return Err(format!("{words:?} is no replacement"));
            };
            items.push(UnmapAndReplace {
                host_addr: self.place(actor.0, place)?,
                new_addr: self.place(actor.0, new)?,
                handle: self.handle(handle)?,
                status: UNWRITTEN,
            });
        }
        let read = self.batch(actor, call, &items, &["status"])?;
        Self::results(call, &read, |item| item.status, |_, _, _| Ok(()))
    }

    fn setup(&self, actor: (char, usize), call: &Call) -> Outcome {
        let [dom, frames] = call.items[0].as_slice() else {
            return Err("setup of which table to which size".to_owned());
        };
        let list = List::new(self, actor.0, call, self.rig.abi_of(actor.0).word_size())?;
        let item = SetupTable {
            dom: self.domain(dom)?,
            nr_frames: narrow(number(frames)?)?,
            status: UNWRITTEN,
            frame_list: list.address,
        };
        let read = self.batch(actor, call, &[item], &["status"])?;
        list.put_back(self, actor.0);
        Self::results(
            call,
            &read,
            |item| item.status,
            |_, _, words| list.check(self, actor.0, words),
        )
    }

    fn status_frames(&self, actor: (char, usize), call: &Call) -> Outcome {
        let [dom, frames] = call.items[0].as_slice() else {
            return Err("status frames of which table and how many".to_owned());
        };
        let list = List::new(self, actor.0, call, 8)?;
        let item = GetStatusFrames {
            nr_frames: narrow(number(frames)?)?,
            dom: self.domain(dom)?,
            status: UNWRITTEN,
            frame_list: list.address,
        };
        let read = self.batch(actor, call, &[item], &["status"])?;
        list.put_back(self, actor.0);
        Self::results(
            call,
            &read,
            |item| item.status,
            |_, _, words| list.check(self, actor.0, words),
        )
    }

    fn transfer(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [frame, domid, gref] = words.as_slice() else {
                return Err(format!("{words:?} is no transfer"));
            };
            items.push(Transfer {
                mfn: self.frame_number(actor.0, frame)?,
                domid: self.domain(domid)?,
                gref: gref_of(gref)?,
                status: UNWRITTEN,
            });
        }
        let read = self.batch(actor, call, &items, &["status"])?;
        Self::results(call, &read, |item| item.status, |_, _, _| Ok(()))
    }

    fn copy(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [source, dest, len] = words.as_slice() else {
                return Err(format!("{words:?} is no copy"));
            };
            let (source, source_gref) = self.side(actor.0, source)?;
            let (dest, dest_gref) = self.side(actor.0, dest)?;
            let mut flags = match call.option("flags") {
                Some(flags) => CopyFlags::from_bits_retain(short(number(flags)?)?),
                None => CopyFlags::empty(),
            };
            flags.set(CopyFlags::SOURCE_GREF, source_gref);
            flags.set(CopyFlags::DEST_GREF, dest_gref);
            items.push(Copy {
                source,
                dest,
                len: short(number(len)?)?,
                flags,
                status: UNWRITTEN,
            });
        }
        // What is to move, in the order of the items, is what the frames must hold afterwards.
        for (item, words) in items.iter().zip(&call.results) {
            if let Some(moved) = words.get(1) {
                let (from, to) = moved.split_once('>').ok_or(format!("what is {moved}"))?;
                let (from, to) = (self.rig.frame(actor.0, from)?, self.rig.frame(actor.0, to)?);
                let (start, end) = (usize::from(item.source.offset), usize::from(item.dest.offset));
                let mut contents = self.contents.borrow_mut();
                let bytes = contents[&from][start..start + usize::from(item.len)].to_vec();
                let dest = contents.get_mut(&to).ok_or("no such frame")?;
                dest[end..end + bytes.len()].copy_from_slice(&bytes);
            }
        }
        let read = self.batch(actor, call, &items, &["status"])?;
        Self::results(call, &read, |item| item.status, |_, _, _| Ok(()))
    }

    /// `g1/5@100`, `f:L0@0`, `f2:L0@0`.
    fn side(&self, actor: char, word: &str) -> Result<(CopyPtr, bool), String> {
        let (what, offset) = word.split_once('@').ok_or(format!("{word} has no offset"))?;
        let offset = short(number(offset)?)?;
        if let Some(grant) = what.strip_prefix('g') {
            let (domid, gref) = self.grant(grant)?;
            return Ok((CopyPtr::grant(domid, gref, offset), true));
        }
        let (domain, frame) = what
            .strip_prefix('f')
            .and_then(|rest| rest.split_once(':'))
            .ok_or("no side")?;
        let mut side = CopyPtr::frame(0, offset);
        side.u = match frame {
            "X" => Gfn::containing(self.place(actor, frame)?).0,
            _ => match domain {
                "1" => self.frame_number('G', frame)?,
                _ => self.frame_number(actor, frame)?,
            },
        };
        if !domain.is_empty() {
            side.domid = self.domain(domain)?;
        }
        Ok((side, false))
    }

    fn frames_hold_what_they_must(&self) -> Outcome {
        let now = self.rig.contents();
        for (frame, wanted) in &*self.contents.borrow() {
            let Some(bytes) = now.get(frame) else { continue };
            if let Some(at) = (0..wanted.len()).find(|at| bytes[*at] != wanted[*at]) {
                return Err(format!(
                    "byte {at} of {} is not what it must be",
                    self.rig.frame_name(*frame)
                ));
            }
        }
        Ok(())
    }

    fn query(&self, actor: (char, usize), call: &Call) -> Outcome {
        let preset = call.option("preset").unwrap_or("0xEEEEEEEE,0xDDDDDDDD");
        let (nr, max) = preset.split_once(',').ok_or("two numbers")?;
        let item = QuerySize {
            dom: self.domain(&call.items[0][0])?,
            nr_frames: narrow(number(nr)?)?,
            max_nr_frames: narrow(number(max)?)?,
            status: UNWRITTEN,
        };
        let read = self.batch(actor, call, &[item], &["status", "nr_frames", "max_nr_frames"])?;
        Self::results(
            call,
            &read,
            |item| item.status,
            |_, got, words| match words {
                [nr, max] => {
                    same("nr_frames", got.nr_frames, narrow(number(nr)?)?)?;
                    same("max_nr_frames", got.max_nr_frames, narrow(number(max)?)?)
                }
                _ => same("structure", *got, item),
            },
        )
    }

    fn set_version(&self, actor: (char, usize), call: &Call) -> Outcome {
        let item = SetVersion {
            version: narrow(number(&call.items[0][0])?)?,
        };
        let read = self.batch(actor, call, &[item], &["version"])?;
        let wanted = call.results.first().and_then(|words| words.first());
        match (read[0], wanted.map(String::as_str)) {
            (Some(got), None | Some("unwritten")) => same("version", got, item),
            (Some(got), Some(version)) => same("version", got.version, narrow(number(version)?)?),
            (None, _) => Ok(()),
        }
    }

    fn get_version(&self, actor: (char, usize), call: &Call) -> Outcome {
        let option = |name, default| call.option(name).map_or(Ok(default), number);
        let item = GetVersion {
            dom: self.domain(&call.items[0][0])?,
            pad: short(option("pad", 0)?)?,
            version: narrow(option("preset", 0xEEEE_EEEE)?)?,
        };
        let read = self.batch(actor, call, &[item], &["version"])?;
        let wanted = narrow(number(&call.results[0][0])?)?;
        same("version", read[0].map(|got| got.version), Some(wanted))
    }

    fn swap(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [a, b] = words.as_slice() else {
                return Err(format!("{words:?} is no swap"));
            };
            items.push(SwapGrantRef {
                ref_a: gref_of(a)?,
                ref_b: gref_of(b)?,
                status: UNWRITTEN,
            });
        }
        let read = self.batch(actor, call, &items, &["status"])?;
        Self::results(call, &read, |item| item.status, |_, _, _| Ok(()))
    }

    fn flush(&self, actor: (char, usize), call: &Call) -> Outcome {
        let mut items = Vec::new();
        for words in &call.items {
            let [address, offset, length, op] = words.as_slice() else {
                return Err(format!("{words:?} is no flush"));
            };
            items.push(CacheFlush {
                dev_bus_addr: self.place(actor.0, address)?,
                offset: short(number(offset)?)?,
                length: short(number(length)?)?,
                op: CacheOp::from_bits_retain(narrow(number(op)?)?),
            });
        }
        self.batch(actor, call, &items, &[]).map(drop)
    }

    fn dump(&self, actor: (char, usize), call: &Call) -> Outcome {
        let item = DumpTable {
            dom: self.domain(&call.items[0][0])?,
            status: UNWRITTEN,
        };
        let read = self.batch(actor, call, &[item], &["status"])?;
        Self::results(call, &read, |item| item.status, |_, _, _| Ok(()))
    }

    fn memory_op(&self, actor: (char, usize), call: &Call) -> Outcome {
        let words = &call.items[0];
        let at = |index: usize| words.get(index).map(String::as_str).ok_or("too few words");
        let rc = if call.verb == "physmap" {
            let request = AddToPhysmap {
                domid: self.domain(at(0)?)?,
                space: PHYSMAP_SPACE_GRANT_TABLE,
                idx: number(at(1)?)?,
                gpfn: match at(2)? {
                    "gfn:0xFFFFFFFFFFFFFFFF" => u64::MAX,
                    place => Gfn::containing(self.place(actor.0, place)?).0,
                },
                ..AddToPhysmap::default()
            };
            self.rig.add_to_physmap(actor, request)
        } else {
            let request = AcquireResource {
                domid: self.domain(at(0)?)?,
                kind: RESOURCE_GRANT_TABLE,
                id: narrow(number(at(1)?)?)?,
                frame: number(at(2)?)?,
                nr_frames: narrow(number(at(3)?)?)?,
                pad: u32::from(words.iter().any(|word| word == "pad=1")),
                frame_list: if words.iter().any(|word| word == "null") {
                    0
                } else {
                    LIST
                },
            };
            let (rc, answer) = self.rig.acquire_resource(actor, request);
            for word in call.results.iter().flatten() {
                let wanted = word.strip_prefix("nr=").ok_or(format!("what is {word}"))?;
                same("nr_frames", answer, narrow(number(wanted)?)?)?;
            }
            rc
        };
        self.same_rc(rc, &call.rc)
    }

    // --- the world ------------------------------------------------------------------------------

    fn world(&self, words: &[String], is: &[String]) -> Outcome {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let is: Vec<&str> = is.iter().map(String::as_str).collect();
        match (words.as_slice(), is.as_slice()) {
            ([domain, "at", place], is) => {
                let domain = letter(domain);
                self.rig.holds_at(domain, self.place(domain, place)?, is)
            }
            (["avail", domain, place], [bits]) => {
                let domain = letter(domain);
                same(
                    "bits",
                    self.rig.guest_bits(domain, self.place(domain, place)?)?,
                    number(bits)?,
                )
            }
            (["setpte", domain, place, frame], []) => {
                let domain = letter(domain);
                self.rig
                    .set_pte(domain, self.place(domain, place)?, self.rig.frame(domain, frame)?)
            }
            (["ptebits", domain, place, bits], []) => {
                let domain = letter(domain);
                self.rig
                    .set_guest_bits(domain, self.place(domain, place)?, number(bits)?)
            }
            (["p2m", domain, place, kind @ ..], []) => {
                let domain = letter(domain);
                let gfn = Gfn::containing(self.place(domain, place)?);
                let frame = kind
                    .get(1)
                    .map(|frame| self.rig.frame(domain, frame))
                    .transpose()?;
                self.rig.set_p2m(domain, gfn, kind[0], frame)
            }
            (["many", count], []) => {
                self.rig.many(narrow(number(count)?)?)?;
                *self.contents.borrow_mut() = self.rig.contents();
                Ok(())
            }
            (["low_copy", table, gref, frame], []) => {
                let entry = self.rig.entry(letter(table), gref_of(gref)?)?;
                same("a low number", entry.frame < 1 << 32, true)?;
                let bytes = self.rig.owned_bytes(letter(table), Mfn(entry.frame))?;
                same(
                    "same bytes",
                    bytes == self.contents.borrow()[&self.rig.frame('C', frame)?],
                    true,
                )
            }
            (words, is) => self.rig.world(words, is),
        }
    }
}

/// A list of frame numbers in the caller's memory.
struct List {
    address: u64,
    element: usize,
    hole: Option<u64>,
}

/// Elements that the list's memory has, and what they hold before.
const ELEMENTS: usize = 2048;

impl List {
    fn new(runner: &Runner, actor: char, call: &Call, element: usize) -> Result<List, String> {
        runner.rig.write_guest(actor, LIST, &[UNTOUCHED; ELEMENTS * 8]);
        let width = u64::try_from(element).map_err(|error| error.to_string())?;
        let mut list = List {
            address: LIST,
            element,
            hole: None,
        };
        match call.option("list") {
            None => {}
            Some("unmapped") => list.hole = Some(0),
            Some(option) => match option.strip_prefix("hole:") {
                Some(index) => list.hole = Some(number(index)?),
                None => list.address = number(option)?,
            },
        }
        if let Some(index) = list.hole {
            // No memory but a fault injector can take one element out of the middle of a page.
            let bytes = if index == 0 { 16 * 4096 } else { width };
            runner
                .rig
                .protect(actor, LIST + index * width, bytes, Protection::Unmapped);
        }
        Ok(list)
    }

    fn put_back(&self, runner: &Runner, actor: char) {
        runner.rig.protect(actor, LIST, 16 * 4096, Protection::Open);
    }

    /// `list=4`, `list=0x1234`, `list=stored,hole,untouched`, or nothing.
    fn check(&self, runner: &Runner, actor: char, words: &[String]) -> Outcome {
        let Some(wanted) = words.iter().find_map(|word| word.strip_prefix("list=")) else {
            return Ok(());
        };
        let mut bytes = vec![0; ELEMENTS * self.element];
        runner.rig.read_guest(actor, LIST, &mut bytes);
        let element = |index: usize| &bytes[index * self.element..(index + 1) * self.element];
        let touched = |index: usize| element(index).iter().any(|byte| *byte != UNTOUCHED);
        if wanted.starts_with("0x") {
            let mut got = [0; 8];
            got[..self.element].copy_from_slice(element(0));
            return same("frame number", Gfn(u64::from_le_bytes(got)), Gfn(number(wanted)?));
        }
        if let Ok(count) = wanted.parse::<usize>() {
            let stored = (0..ELEMENTS).filter(|index| touched(*index)).count();
            same("numbers stored", stored, count)?;
            return same("last number stored", count == 0 || touched(count - 1), true);
        }
        for (index, word) in wanted.split(',').enumerate() {
            same(
                &format!("element {index} stored"),
                touched(index),
                word == "stored",
            )?;
        }
        Ok(())
    }
}

/// What the runner needs of an argument: the methods that all of them have, and what is written back.
trait Argument: core::marker::Copy {
    const OP: Op;
    /// The whole structure is written back, padding and all.
    const WHOLE: bool = false;
    fn size(abi: Abi) -> usize;
    fn encode(&self, abi: Abi, bytes: &mut [u8]) -> Result<(), EncodeError>;
    fn decode(abi: Abi, bytes: &[u8]) -> Result<Self, Truncated>;
    fn fields(abi: Abi) -> &'static [(&'static str, usize, usize)];

    /// Where its status lies.
    fn status_offset(abi: Abi) -> Option<usize> {
        let field = Self::fields(abi).iter().find(|(field, ..)| *field == "status");
        field.map(|(_, offset, _)| *offset)
    }
}

macro_rules! argument {
    ($($name:ident $(: $whole:literal)?;)*) => {$(
        impl Argument for gnttab_abi::$name {
            const OP: Op = Op::$name;
            $(const WHOLE: bool = $whole;)?
            fn size(abi: Abi) -> usize {
                gnttab_abi::$name::size(abi)
            }
            fn encode(&self, abi: Abi, bytes: &mut [u8]) -> Result<(), EncodeError> {
                gnttab_abi::$name::encode(self, abi, bytes)
            }
            fn decode(abi: Abi, bytes: &[u8]) -> Result<Self, Truncated> {
                gnttab_abi::$name::decode(abi, bytes)
            }
            fn fields(abi: Abi) -> &'static [(&'static str, usize, usize)] {
                gnttab_abi::$name::fields(abi)
            }
        }
    )*};
}
// Spec 1.8. The 32-bit setup_table writes everything back too, and what it does to the padding
// nobody can tell from its own bytes.
argument! {
    MapGrantRef: true; UnmapGrantRef; SetupTable: true; DumpTable; Transfer; Copy; QuerySize: true;
    UnmapAndReplace; SetVersion: true; GetStatusFrames: true; GetVersion; SwapGrantRef; CacheFlush;
}

// --- words that need no runner --------------------------------------------------------------------

/// The number of one of the scene's domains.
pub(crate) fn id_of(letter: char) -> DomId {
    match letter {
        'P' => DomId(0),
        'G' => DomId(1),
        'C' => DomId(2),
        _ => DomId(3),
    }
}

pub(crate) fn letter(word: &str) -> char {
    word.chars().next().unwrap_or_default()
}

/// Decimal, or hexadecimal with its prefix.
pub(crate) fn number(word: &str) -> Result<u64, String> {
    let parsed = match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    };
    parsed.map_err(|_| format!("{word} is no number"))
}

fn narrow(number: u64) -> Result<u32, String> {
    number.try_into().map_err(|_| format!("{number:#x} is too wide"))
}

fn short(number: u64) -> Result<u16, String> {
    number.try_into().map_err(|_| format!("{number:#x} is too wide"))
}

fn gref_of(word: &str) -> Result<GrantRef, String> {
    Ok(GrantRef(narrow(number(word)?)?))
}

fn map_flags(word: &str) -> Result<MapFlags, String> {
    word.split('+').try_fold(MapFlags::empty(), |flags, name| {
        Ok(flags
            | match name {
                "host" => MapFlags::HOST_MAP,
                "dev" => MapFlags::DEVICE_MAP,
                "ro" => MapFlags::READONLY,
                "app" => MapFlags::APPLICATION_MAP,
                "pte" => MapFlags::CONTAINS_PTE,
                _ => MapFlags::from_bits_retain(narrow(number(name)?)?),
            })
    })
}

fn status_of(name: &str) -> Result<GrantStatus, String> {
    let name = match name {
        "ok" => "okay",
        "unwritten" | "unread" => return Ok(UNWRITTEN),
        _ => name,
    };
    let known = GrantStatus::ALL.iter().find(|status| status.name() == Some(name));
    known.copied().ok_or(format!("no status is named {name}"))
}

fn op_of(word: &str) -> Result<Op, String> {
    Ok(match word {
        "map" => Op::MapGrantRef,
        "unmap" => Op::UnmapGrantRef,
        "setup" => Op::SetupTable,
        "dump" => Op::DumpTable,
        "transfer" => Op::Transfer,
        "copy" => Op::Copy,
        "query" => Op::QuerySize,
        "replace" => Op::UnmapAndReplace,
        "status_frames" => Op::GetStatusFrames,
        "swap" => Op::SwapGrantRef,
        "flush" => Op::CacheFlush,
        _ => return Err(format!("no operation is named {word}")),
    })
}

/// The heart of every check.
pub(crate) fn same<T: PartialEq + core::fmt::Debug>(what: &str, got: T, wanted: T) -> Outcome {
    if got == wanted {
        Ok(())
    } else {
        Err(format!("{what}: {got:?}, not {wanted:?}"))
    }
}
