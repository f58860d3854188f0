//! Random programs, played on both sides, and what differs, made small.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;

use fastrand::Rng;
use gnttab_abi::Op;
use gnttab_conformance::mailbox::Meeting;
use gnttab_conformance::mailbox::{OWN_PAGES, OWN_SPARES};
use gnttab_conformance::script::{CallHead, Head, OTHER, Place, Step, Value, fields};
use gnttab_engine::Reference;
use serde::Serialize;

use crate::accepted::Accepted;
use crate::engine_world::{EngineWorld, Settings};
use crate::generate::program;
use crate::puppets::{Plan, Puppet, control_version, new_pages};
use crate::real_xen::{RealXen, Tools, XenError};

/// Programs that are handed over at once.
const BATCH: usize = 256;
/// Bytes and steps of a batch: what fits the mailbox.
const BATCH_BYTES: usize = 900_000;
const BATCH_STEPS: usize = 50_000;
/// Programs that are tried to make one smaller.
const TRIES: u32 = 400;

/// What a run found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Seed of the programs.
    pub(crate) seed: u64,
    /// Hypercalls made.
    pub(crate) operations: u64,
    /// Arguments of them.
    pub(crate) items: u64,
    /// Programs played.
    pub(crate) scripts: u64,
    /// How often each operation answered what, if only the engine was asked.
    pub(crate) answers: BTreeMap<String, BTreeMap<i64, u64>>,
    /// Version of the hypervisor that was asked, major in the upper half; 0: none was.
    pub(crate) xen: u32,
    /// What differed.
    pub(crate) differences: Vec<Difference>,
}

impl Report {
    fn new(seed: u64) -> Report {
        Report {
            seed,
            operations: 0,
            items: 0,
            scripts: 0,
            answers: BTreeMap::new(),
            xen: 0,
            differences: Vec::new(),
        }
    }

    /// How many differences are not listed.
    pub(crate) fn unlisted(&self) -> usize {
        self.differences
            .iter()
            .filter(|found| found.listed.is_none())
            .count()
    }
}

/// A program whose answers differ.
#[derive(Debug, Serialize)]
pub(crate) struct Difference {
    /// Its number in the run of its machine.
    pub(crate) script: u64,
    /// Frames that the caller's table and the other domain's had before.
    pub(crate) frames: [u32; 2],
    /// The program, made small, in words.
    pub(crate) program: Vec<String>,
    /// The step at which the answers part.
    pub(crate) step: usize,
    /// What was seen differently.
    pub(crate) what: String,
    /// What Xen answered.
    pub(crate) xen: Option<u64>,
    /// What the engine answered.
    pub(crate) engine: Option<u64>,
    /// The accepted difference that it falls under.
    pub(crate) listed: Option<String>,
}

/// Both sides, started together: their tables have grown by the same steps.
struct Pair {
    xen: RealXen,
    engine: EngineWorld,
    clean: bool,
}

impl Pair {
    fn start(tools: &Tools, settings: Settings) -> Result<Pair, XenError> {
        let mut xen = RealXen::start(tools, settings, "")?;
        let other = make_other(&mut xen)?;
        xen.introduce(&other)?;
        let settings = Settings {
            reference: reference_of(xen.version),
            ..settings
        };
        Ok(Pair {
            xen,
            engine: EngineWorld::new(settings),
            clean: true,
        })
    }

    /// Plays one program on both; their words.
    fn both(&mut self, script: &[u8], verbose: bool) -> Result<(Vec<u64>, Vec<u64>), XenError> {
        self.xen.ask(std::iter::once(script), verbose)?;
        let engine_clean = self.engine.run(script, verbose);
        let mut answers = self.xen.answers()?;
        self.clean &= engine_clean && answers.clean;
        Ok((
            answers.scripts.pop().unwrap_or_default(),
            self.engine.answer.clone(),
        ))
    }
}

/// Whose behaviour the engine is to have beside a hypervisor of that version.
pub(crate) fn reference_of(xen: u32) -> Reference {
    if xen < 0x4_0014 {
        Reference::V4_17
    } else {
        Reference::V4_20
    }
}

/// The second domain, and pages of both for transfers.
fn make_other(xen: &mut RealXen) -> Result<Meeting, XenError> {
    const HALF: usize = OWN_SPARES / 2;
    let plan = Plan {
        id: OTHER,
        vcpus: 1,
        grant_frames: None,
        maptrack_frames: None,
        version: 2,
        pages: OWN_PAGES + HALF,
    };
    let other = Puppet::create(xen, &plan)?;
    let mut spares = [0; 2 * HALF];
    new_pages(xen, &mut spares[..HALF])?;
    for (at, spare) in spares[HALF..].iter_mut().enumerate() {
        *spare = other.page(OWN_PAGES + at);
    }
    for spare in spares {
        xen.write(spare << 12, &[0; 4096])?;
    }
    Ok(Meeting {
        control_version: control_version(xen.version),
        words: other.words_frame(),
        pages: std::array::from_fn(|page| other.page(page)),
        spares,
        arguments: std::array::from_fn(|page| other.argument_frame(page)),
        lists: std::array::from_fn(|page| other.list_frame(page)),
        slots_table: other.slots_table(),
    })
}

fn encode(steps: &[Step]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for step in steps {
        step.encode(&mut bytes);
    }
    bytes
}

/// A program that makes the tables as large as they were.
fn grow(frames: [u32; 2]) -> Vec<Step> {
    let call = CallHead {
        other: false,
        command: Op::SetupTable as u64,
        op: Op::SetupTable,
        place: Place::Area(0, 0),
        count: 1,
        total: 1,
        items: 1,
    };
    let list = Value::Area(gnttab_conformance::script::LIST, 0);
    let doms = [0x7FF0, u64::from(OTHER)];
    let step = |(dom, frames): (u64, u32)| {
        let item = [dom, u64::from(frames), 0x7777].map(Value::Lit);
        Step {
            head: Head::Call(call),
            items: vec![item.into_iter().chain([list]).collect()],
        }
    };
    doms.into_iter().zip(frames).map(step).collect()
}

fn operations(steps: &[Step]) -> (u64, u64) {
    steps.iter().fold((0, 0), |(calls, items), step| match step.head {
        Head::Call(call) => (calls + 1, items + u64::from(call.total)),
        _ => (calls, items),
    })
}

/// Plays programs until there were enough operations, or enough differences: on so many machines at
/// once, each with programs of its own.
pub(crate) fn compare(
    tools: Option<&Tools>,
    settings: Settings,
    accepted: &Accepted,
    seed: u64,
    enough: u64,
    most: usize,
    machines: u32,
) -> Result<Report, XenError> {
    let Some(tools) = tools else {
        let mut report = Report::new(seed);
        let mut rng = Rng::with_seed(seed);
        for (inside, enough) in [(true, enough / 2), (false, enough)] {
            let settings = Settings { inside, ..settings };
            engine_only(&mut rng, settings, enough, &mut report);
        }
        return Ok(report);
    };
    let machines = u64::from(machines.max(1));
    let share = enough.div_ceil(machines);
    let on_one = |machine: u64| {
        // The first has the programs that it would have alone.
        let mut seeds = Rng::with_seed(seed);
        let rng = (0..machine).fold(Rng::with_seed(seed), |_, _| seeds.fork());
        // Beside every other machine the engine works outside of tables.
        let settings = Settings {
            inside: machine.is_multiple_of(2),
            ..settings
        };
        compare_one(tools, settings, accepted, rng, Report::new(seed), share, most)
    };
    let reports: Result<Vec<Report>, XenError> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..machines)
            .map(|machine| scope.spawn(move || on_one(machine)))
            .collect();
        let joined = running.into_iter().map(|one| one.join());
        joined
            .map(|report| report.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut whole = Report::new(seed);
    for report in reports? {
        whole.operations += report.operations;
        whole.items += report.items;
        whole.scripts += report.scripts;
        whole.xen = report.xen;
        whole.differences.extend(report.differences);
    }
    Ok(whole)
}

fn compare_one(
    tools: &Tools,
    settings: Settings,
    accepted: &Accepted,
    mut rng: Rng,
    mut report: Report,
    enough: u64,
    most: usize,
) -> Result<Report, XenError> {
    let mut pair = Pair::start(tools, settings)?;
    report.xen = pair.xen.version;
    let mut waiting: VecDeque<Vec<Step>> = VecDeque::new();
    while report.operations < enough && report.unlisted() < most {
        if !pair.clean {
            drop(pair);
            pair = Pair::start(tools, settings)?;
        }
        let (mut batch, mut bytes, mut steps) = (Vec::new(), 0, 0);
        while batch.len() < BATCH {
            let program = waiting
                .pop_front()
                .unwrap_or_else(|| program(&mut rng, settings.max_frames, settings.kills));
            let encoded = encode(&program);
            if bytes + encoded.len() + 8 > BATCH_BYTES || steps + program.len() + 4 > BATCH_STEPS {
                waiting.push_front(program);
                break;
            }
            bytes += encoded.len() + 8;
            steps += program.len() + 4;
            batch.push((program, encoded));
        }
        pair.xen
            .ask(batch.iter().map(|(_, encoded)| encoded.as_slice()), false)?;
        let (mut engine_answers, mut frames) = (Vec::new(), Vec::new());
        let mut engine_clean = true;
        for (_, encoded) in &batch {
            frames.push(pair.engine.frames());
            engine_clean = pair.engine.run(encoded, false);
            engine_answers.push(std::mem::take(&mut pair.engine.answer));
            if !engine_clean {
                break;
            }
        }
        let answers = match pair.xen.answers() {
            Ok(answers) => answers,
            Err(XenError::Silent { script, console, .. }) => {
                let silent = usize::try_from(script).unwrap_or(0).min(batch.len() - 1);
                let found = Difference {
                    script: report.scripts + script,
                    frames: frames.get(silent).copied().unwrap_or_default(),
                    program: batch[silent].0.iter().map(words).collect(),
                    step: 0,
                    what: format!(
                        "a script that Xen did not come to an end of; its console ended with\n{console}\nand it was"
                    ),
                    xen: None,
                    engine: None,
                    listed: None,
                };
                eprintln!("{}", told(&found));
                report.differences.push(found);
                pair.clean = false;
                // Those before it are played again, those after it too.
                batch.remove(silent);
                waiting.extend(batch.into_iter().map(|(program, _)| program));
                continue;
            }
            Err(why) => return Err(why),
        };
        pair.clean = answers.clean && engine_clean;
        let mut differs = None;
        let mut played = 0;
        for (index, (xen, engine)) in answers.scripts.iter().zip(&engine_answers).enumerate() {
            let (calls, items) = operations(&batch[index].0);
            report.operations += calls;
            report.items += items;
            report.scripts += 1;
            played = index + 1;
            if xen != engine {
                differs = Some(index);
                break;
            }
        }
        if let Some(index) = differs {
            let number = report.scripts - 1;
            drop(pair);
            let mut found = explain(tools, settings, &batch[..=index], &frames, number)?;
            found.listed = accepted
                .of_script(&found, reference_of(report.xen))
                .map(|entry| entry.id.clone());
            eprintln!("{}", told(&found));
            report.differences.push(found);
            pair = Pair::start(tools, settings)?;
        }
        // What was not played, since something was not clean any more, comes again.
        for (program, _) in batch.drain(played..).rev() {
            waiting.push_front(program);
        }
    }
    Ok(report)
}

/// Without a real Xen: no panic, clean ends, books that balance.
fn engine_only(rng: &mut Rng, settings: Settings, enough: u64, report: &mut Report) {
    let mut engine = EngineWorld::new(settings);
    while report.operations < enough {
        let program = program(rng, settings.max_frames, 0);
        let clean = engine.run(&encode(&program), true);
        tally(&engine, &program, &mut report.answers);
        let (calls, items) = operations(&program);
        report.operations += calls;
        report.items += items;
        report.scripts += 1;
        let wrong = engine.audit();
        if !clean || !wrong.is_empty() {
            let mut small = program;
            let made = make_small(&mut small, &mut |fewer| {
                let mut engine = EngineWorld::new(settings);
                Ok(!engine.run(&encode(fewer), false) || !engine.audit().is_empty())
            });
            debug_assert!(made.is_ok(), "the engine is always there");
            let found = Difference {
                script: report.scripts - 1,
                frames: engine.frames(),
                step: small.len(),
                program: small.iter().map(words).collect(),
                what: format!("clean: {clean}; {}", wrong.join("; ")),
                xen: None,
                engine: None,
                listed: None,
            };
            eprintln!("{}", told(&found));
            report.differences.push(found);
            return;
        }
    }
}

/// Counts the statuses of what was seen, and the results of calls that are not 0.
fn tally(engine: &EngineWorld, program: &[Step], answers: &mut BTreeMap<String, BTreeMap<i64, u64>>) {
    for seen in &engine.seen {
        let Some(Head::Call(call)) = program.get(seen.step).map(|step| step.head) else {
            continue;
        };
        let value = engine.answer[seen.at];
        let (answer, what) = match seen.what {
            "status" => (
                u16::try_from(value).map(|status| i64::from(status.cast_signed())),
                "status",
            ),
            "result" if value != 0 => (Ok(value.cast_signed()), "result"),
            _ => continue,
        };
        if let Ok(answer) = answer {
            let of = answers.entry(format!("{} {what}", call.op)).or_default();
            *of.entry(answer).or_default() += 1;
        }
    }
}

/// Plays a program on a pair whose table is as large as it was, and starts anew where it cannot.
struct Lab<'t> {
    tools: &'t Tools,
    settings: Settings,
    frames: [u32; 2],
    pair: Pair,
}

impl Lab<'_> {
    /// Tables never shrink.
    fn beyond(&self) -> bool {
        let is = self.pair.engine.frames();
        is.iter().zip(&self.frames).any(|(is, wanted)| is > wanted)
    }

    /// A pair with tables of that size.
    fn prepare(&mut self, frames: [u32; 2]) -> Result<(), XenError> {
        self.frames = frames;
        self.pair = Pair::start(self.tools, self.settings)?;
        self.pair_or_new()?;
        Ok(())
    }

    /// The pair, or another if it cannot serve any more.
    fn pair_or_new(&mut self) -> Result<&mut Pair, XenError> {
        if !self.pair.clean {
            self.pair = Pair::start(self.tools, self.settings)?;
        }
        if self.pair.engine.frames() != self.frames {
            self.pair.both(&encode(&grow(self.frames)), false)?;
        }
        Ok(&mut self.pair)
    }

    /// Whether the last of these differs when all are played on a new pair.
    fn differs_after(&mut self, batch: &[(Vec<Step>, Vec<u8>)], frames: [u32; 2]) -> Result<bool, XenError> {
        self.prepare(frames)?;
        let mut differs = false;
        for (_, encoded) in batch {
            let (xen, engine) = self.pair.both(encoded, false)?;
            differs = xen != engine;
        }
        Ok(differs)
    }

    fn differs(&mut self, steps: &[Step]) -> Result<bool, XenError> {
        self.pair.clean &= !self.beyond();
        let (xen, engine) = self.pair_or_new()?.both(&encode(steps), false)?;
        // Whoever ended differently may have left different things behind.
        self.pair.clean &= xen.last() == engine.last();
        Ok(xen != engine)
    }
}

fn explain(
    tools: &Tools,
    settings: Settings,
    batch: &[(Vec<Step>, Vec<u8>)],
    frames: &[[u32; 2]],
    script: u64,
) -> Result<Difference, XenError> {
    let index = batch.len() - 1;
    let mut lab = Lab {
        tools,
        settings,
        frames: frames[index],
        pair: Pair::start(tools, settings)?,
    };
    let mut steps = batch[index].0.clone();
    if lab.differs(&steps)? {
        make_small(&mut steps, &mut |fewer| lab.differs(fewer))?;
    } else {
        // After those before it, then: as few of them as will do.
        let mut from = 0;
        let mut last = index;
        while last > from {
            let middle = from + (last - from).div_ceil(2);
            if lab.differs_after(&batch[middle..], frames[middle])? {
                from = middle;
            } else {
                last = middle - 1;
            }
        }
        eprintln!("script {script} differs only after {} before it", index - from);
        if lab.differs_after(&batch[from..], frames[from])? {
            for (steps, _) in &batch[from..index] {
                eprintln!("  one of them:");
                for step in steps {
                    eprintln!("    {}", words(step));
                }
            }
        }
        lab.prepare(frames[from])?;
        for (_, before) in &batch[from..index] {
            lab.pair.both(before, false)?;
        }
    }
    let (xen, engine) = lab.pair_or_new()?.both(&encode(&steps), true)?;
    let first = (0..xen.len().max(engine.len())).find(|at| xen.get(*at) != engine.get(*at));
    let at = first.unwrap_or(0);
    let seen = lab.pair.engine.seen.iter().rfind(|seen| seen.at <= at);
    Ok(Difference {
        script,
        frames: frames[index],
        program: steps.iter().map(words).collect(),
        step: seen.map_or(0, |seen| seen.step),
        what: seen.map_or_else(String::new, |seen| format!("{} {}", seen.what, seen.index)),
        xen: xen.get(at).copied(),
        engine: engine.get(at).copied(),
        listed: None,
    })
}

/// Leaves out steps, then arguments, as long as there is a difference.
fn make_small(
    steps: &mut Vec<Step>,
    differs: &mut dyn FnMut(&[Step]) -> Result<bool, XenError>,
) -> Result<(), XenError> {
    let mut tries = 0;
    let mut chunk = steps.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        let mut smaller = false;
        while at < steps.len() && tries < TRIES {
            let mut fewer = steps.clone();
            fewer.drain(at..(at + chunk).min(steps.len()));
            tries += 1;
            if differs(&fewer)? {
                *steps = fewer;
                smaller = true;
            } else {
                at += chunk;
            }
        }
        if chunk == 1 && (!smaller || tries >= TRIES) {
            break;
        }
        chunk = (chunk / 2).max(1);
    }
    for step in 0..steps.len() {
        let mut item = 0;
        while item < steps[step].items.len() && steps[step].items.len() > 1 && tries < TRIES {
            let mut fewer = steps.clone();
            fewer[step].items.remove(item);
            if let Head::Call(call) = &mut fewer[step].head
                && call.total == call.items
                && call.count == u64::from(call.items)
            {
                call.items -= 1;
                call.total -= 1;
                call.count -= 1;
            } else {
                break;
            }
            tries += 1;
            if differs(&fewer)? {
                *steps = fewer;
            } else {
                item += 1;
            }
        }
    }
    Ok(())
}

// --- in words -----------------------------------------------------------------------------------

fn told(difference: &Difference) -> String {
    let listed = difference.listed.as_deref().unwrap_or("not listed");
    let mut text = format!(
        "{listed}: script {} (tables of {:?} frames): {} at step {}: xen {:x?}, engine {:x?}",
        difference.script,
        difference.frames,
        difference.what,
        difference.step,
        difference.xen,
        difference.engine
    );
    for (index, step) in difference.program.iter().enumerate() {
        let _ = write!(text, "\n  {index}: {step}");
    }
    text
}

fn words(step: &Step) -> String {
    match step.head {
        Head::Call(call) => {
            let mut text = format!("{} at {:?}", call.op, call.place);
            if call.command != call.op as u64 {
                let _ = write!(text, " command {:#x}", call.command);
            }
            if call.count != step.items.len() as u64 || call.total != call.items {
                let _ = write!(text, " count {:#x} of {}", call.count, call.total);
            }
            for item in &step.items {
                text.push_str(" {");
                for (field, value) in fields(call.op).iter().zip(item) {
                    let _ = write!(text, " {}: {}", field.name, value_words(*value));
                }
                text.push_str(" }");
            }
            text
        }
        Head::Entry {
            other,
            version,
            offset,
            size,
            value,
        } => format!(
            "version {version}: store {} bytes at {offset:#x} of {} table: {}",
            size,
            if other { "the other's" } else { "the" },
            value_words(value)
        ),
        other => format!("{other:?}"),
    }
}

fn value_words(value: Value) -> String {
    match value {
        Value::Lit(n) => format!("{n:#x}"),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use gnttab_conformance::script::Reader;
    use gnttab_engine::Reference;

    use super::*;

    const ROOMY: Settings = Settings {
        max_frames: 64,
        max_maptrack_frames: 1024,
        kills: 0,
        reference: Reference::V4_17,
        inside: true,
    };

    /// What the guest reads is what the generator meant.
    #[test]
    fn a_program_survives_its_encoding() {
        let mut rng = Rng::with_seed(3);
        for _ in 0..200 {
            let steps = program(&mut rng, 64, 0);
            let bytes = encode(&steps);
            let mut reader = Reader::new(&bytes);
            for step in &steps {
                assert_eq!(reader.head(), Some(step.head));
                for value in step.items.iter().flatten() {
                    assert_eq!(reader.value(), Some(*value));
                }
            }
            assert_eq!(reader.head(), None);
        }
    }

    /// The engine gets through random programs with its books in order, roomy or tight.
    #[test]
    fn the_engine_ends_every_program_clean() {
        let tight = Settings {
            max_frames: 3,
            max_maptrack_frames: 1,
            kills: 0,
            reference: Reference::V4_17,
            inside: true,
        };
        let list = Accepted::read().expect("it is JSON");
        for settings in [ROOMY, tight] {
            let report = compare(None, settings, &list, 11, 3000, 1, 1).expect("no emulator is asked");
            assert!(report.differences.is_empty(), "{:?}", report.differences);
            let mapped = &report.answers["map_grant_ref status"];
            assert!(mapped[&0] > 200, "most programs are valid: {mapped:?}");
        }
    }

    /// Where copies and flushes are made is nothing that a guest sees.
    #[test]
    fn inside_and_outside_of_tables_the_answers_are_the_same() {
        let mut rng = Rng::with_seed(5);
        let mut worlds = [true, false].map(|inside| EngineWorld::new(Settings { inside, ..ROOMY }));
        for _ in 0..400 {
            let steps = program(&mut rng, ROOMY.max_frames, 0);
            let answers = worlds.each_mut().map(|world| {
                assert!(world.run(&encode(&steps), false));
                std::mem::take(&mut world.answer)
            });
            assert_eq!(
                answers[0],
                answers[1],
                "{:?}",
                steps.iter().map(words).collect::<Vec<_>>()
            );
        }
    }

    /// A difference is found: one world's answer is another's after one byte more.
    #[test]
    fn what_is_seen_reaches_the_digest() {
        let mut rng = Rng::with_seed(4);
        let mut engine = EngineWorld::new(ROOMY);
        let steps = program(&mut rng, 64, 0);
        assert!(engine.run(&encode(&steps), false));
        let first = engine.answer.clone();
        let mut changed = steps;
        let entry = changed.iter_mut().find_map(|step| match &mut step.head {
            Head::Entry {
                value,
                size: 4 | 2 | 8,
                ..
            } => Some(value),
            _ => None,
        });
        *entry.expect("programs grant") = Value::Lit(0x1234);
        assert!(engine.run(&encode(&changed), false));
        assert_ne!(first, engine.answer);
    }
}
