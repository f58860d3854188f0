//! Reads the vectors' files into steps. What the words mean is the runner's business.

use gnttab_abi::Abi;
use gnttab_engine::{DomainKind, Reference};

/// One row of the specification, or one case of a row, with its steps.
#[derive(Clone, Debug)]
pub(crate) struct Vector {
    /// Its number, as `M-01`.
    pub(crate) id: String,
    /// Line of its head.
    pub(crate) line: usize,
    pub(crate) holds: Where,
    pub(crate) steps: Vec<Step>,
    /// Why it has no steps.
    pub(crate) cannot: Option<String>,
    /// Why it is known to fail.
    pub(crate) fails: Option<String>,
}

/// For whom a vector holds.
#[derive(Clone, Debug)]
pub(crate) struct Where {
    pub(crate) kinds: Vec<DomainKind>,
    pub(crate) versions: Vec<u32>,
    pub(crate) narrow: bool,
    pub(crate) references: Vec<Reference>,
    /// `key=value`, or a word by itself with an empty value.
    pub(crate) settings: Vec<(String, String)>,
}

impl Where {
    /// The calling ABI of a caller of that kind.
    pub(crate) fn abi(&self, kind: DomainKind) -> Abi {
        match (kind, self.narrow) {
            (DomainKind::Arm, _) => Abi::Arm,
            (_, true) => Abi::X86_32,
            (_, false) => Abi::X86_64,
        }
    }

    /// A setting's value, if it is there.
    pub(crate) fn setting(&self, name: &str) -> Option<&str> {
        let found = self.settings.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// One line of a vector.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// Its line in the file.
    pub(crate) line: usize,
    /// The line itself.
    pub(crate) text: String,
    /// The place in the engine that it waits for, and how often it happens there.
    pub(crate) on: Option<(String, u32)>,
    /// The domain that acts and its vCPU.
    pub(crate) actor: (char, usize),
    pub(crate) action: Action,
}

impl Step {
    /// Whether it is a call with more than one item.
    pub(crate) fn is_batch(&self) -> bool {
        matches!(&self.action, Action::Call(call) if call.items.len() > 1)
    }
}

/// What a step does or checks.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// A hypercall or memory operation.
    Call(Call),
    /// Writes to, or compares, entries of a table.
    Entry {
        table: char,
        refs: std::ops::RangeInclusive<u32>,
        /// One field, or with an empty name the whole entry.
        field: String,
        write: Write,
        values: Vec<String>,
    },
    /// Anything else: the words, and those behind `==`.
    World { words: Vec<String>, is: Vec<String> },
}

/// How an entry's step touches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    Set,
    Flip,
    Compare,
}

/// A call, its items and what each must give.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) verb: String,
    pub(crate) items: Vec<Vec<String>>,
    /// `@name:value`.
    pub(crate) options: Vec<(String, String)>,
    /// Results item by item, the hypercall's own taken out.
    pub(crate) results: Vec<Vec<String>>,
    /// What the hypercall must return.
    pub(crate) rc: String,
}

impl Call {
    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        let found = self.options.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// A file of vectors.
#[derive(Debug)]
pub(crate) struct Script {
    /// The domain whose table the version of a head is about.
    pub(crate) table: char,
    pub(crate) scene: Vec<Step>,
    pub(crate) vectors: Vec<Vector>,
}

/// Reads a file.
///
/// Panics on what it does not understand: the files are part of the test.
pub(crate) fn parse(file: &str, text: &str) -> Script {
    let mut script = Script {
        table: 'G',
        scene: Vec::new(),
        vectors: Vec::new(),
    };
    for (index, raw) in text.lines().enumerate() {
        let line = index + 1;
        let body = raw.trim();
        if body.is_empty() || body.starts_with('#') {
            continue;
        }
        let fault = |what: &str| -> ! { panic!("{file}:{line}: {what}: {body}") };
        if raw.starts_with(' ') {
            match (script.vectors.last_mut(), body.split_once(' ')) {
                (Some(vector), Some(("cannot", why))) => vector.cannot = Some(why.to_owned()),
                (Some(vector), Some(("fails", why))) => vector.fails = Some(why.to_owned()),
                (Some(vector), _) => vector
                    .steps
                    .push(step(line, body).unwrap_or_else(|why| fault(&why))),
                (None, _) => script
                    .scene
                    .push(step(line, body).unwrap_or_else(|why| fault(&why))),
            }
        } else if let Some(table) = body.strip_prefix("table ") {
            script.table = table.chars().next().unwrap_or_else(|| fault("which table"));
        } else if body != "scene" {
            let (id, rest) = body.split_once(' ').unwrap_or_else(|| fault("a vector for whom"));
            script.vectors.push(Vector {
                id: id.to_owned(),
                line,
                holds: holds(rest).unwrap_or_else(|why| fault(&why)),
                steps: Vec::new(),
                cannot: None,
                fails: None,
            });
        }
    }
    for vector in &script.vectors {
        let one = usize::from(!vector.steps.is_empty()) + usize::from(vector.cannot.is_some());
        assert_eq!(
            one, 1,
            "{file}:{}: {} has either steps or a reason",
            vector.line, vector.id
        );
    }
    script
}

/// The words of a head behind the number.
fn holds(text: &str) -> Result<Where, String> {
    let mut holds = Where {
        kinds: Vec::new(),
        versions: Vec::new(),
        narrow: false,
        references: Vec::new(),
        settings: Vec::new(),
    };
    for word in text.split_whitespace() {
        match word {
            "any" => holds
                .kinds
                .extend([DomainKind::Pv, DomainKind::Hvm, DomainKind::Arm]),
            "PV" => holds.kinds.push(DomainKind::Pv),
            "HVM" => holds.kinds.push(DomainKind::Hvm),
            "Arm" => holds.kinds.push(DomainKind::Arm),
            "v1" => holds.versions.push(1),
            "v2" => holds.versions.push(2),
            "32" => holds.narrow = true,
            "64" => holds.narrow = false,
            "HEAD" => holds.references.push(Reference::Head),
            "4.20" => holds.references.push(Reference::V4_20),
            "4.17" => holds.references.push(Reference::V4_17),
            _ => {
                let (key, value) = word.split_once('=').unwrap_or((word, ""));
                if !SETTINGS.contains(&key) {
                    return Err(format!("unknown word {word}"));
                }
                holds.settings.push((key.to_owned(), value.to_owned()));
            }
        }
    }
    if holds.kinds.is_empty() {
        return Err("no kind of caller".to_owned());
    }
    if holds.versions.is_empty() {
        holds.versions.extend([1, 2]);
    }
    if holds.references.is_empty() {
        holds
            .references
            .extend([Reference::Head, Reference::V4_20, Reference::V4_17]);
    }
    Ok(holds)
}

/// What a head may say besides kinds, versions, widths and references.
const SETTINGS: [&str; 14] = [
    "G",
    "arm32",
    "bare",
    "defaults",
    "frames",
    "iommu",
    "maptrack",
    "maxver",
    "no-dump",
    "no-transfer",
    "no-transitive",
    "policy",
    "vcpus",
    "whole",
];

/// One step.
fn step(line: usize, text: &str) -> Result<Step, String> {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    let mut on = None;
    if words.first() == Some(&"on") {
        let place = *words.get(1).ok_or("where")?;
        let (place, times) = place.split_once('*').unwrap_or((place, "1"));
        on = Some((place.to_owned(), times.parse().map_err(|_| "how often")?));
        words.drain(..2);
    }
    let mut actor = ('C', 0);
    if let Some(who) = words.first().and_then(|word| word.strip_suffix('>')) {
        let (domain, vcpu) = who.split_once('.').unwrap_or((who, "0"));
        let domain = domain.chars().next().ok_or("who acts")?;
        actor = (domain, vcpu.parse().map_err(|_| "which vCPU")?);
        words.remove(0);
    }
    let action = if let Some(arrow) = words.iter().position(|word| *word == "->") {
        Action::Call(call(&words[..arrow], &words[arrow + 1..])?)
    } else if words.first().is_some_and(|word| word.chars().nth(1) == Some('[')) {
        entry(&words)?
    } else {
        let is = words.iter().position(|word| *word == "==").unwrap_or(words.len());
        Action::World {
            words: words[..is].iter().map(|word| (*word).to_owned()).collect(),
            is: words.iter().skip(is + 1).map(|word| (*word).to_owned()).collect(),
        }
    };
    Ok(Step {
        line,
        text: text.to_owned(),
        on,
        actor,
        action,
    })
}

/// `G[5].flags ^= 1`.
fn entry(words: &[&str]) -> Result<Action, String> {
    let (place, how) = (words[0], *words.get(1).ok_or("set or compare")?);
    let (refs, field) = place[2..].split_once(']').ok_or("an unclosed bracket")?;
    let (first, last) = refs.split_once("..").unwrap_or((refs, refs));
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text} is no reference"));
    Ok(Action::Entry {
        table: place.chars().next().ok_or("whose table")?,
        refs: number(first)?..=number(last)?,
        field: field.trim_start_matches('.').to_owned(),
        write: match how {
            "=" => Write::Set,
            "^=" => Write::Flip,
            "==" => Write::Compare,
            _ => return Err(format!("{how} is none of =, ^= and ==")),
        },
        values: words[2..].iter().map(|word| (*word).to_owned()).collect(),
    })
}

/// A call and what it must give.
fn call(words: &[&str], results: &[&str]) -> Result<Call, String> {
    let (verb, words) = words.split_first().ok_or("no verb")?;
    let (options, words): (Vec<&str>, Vec<&str>) = words
        .iter()
        .partition(|word| word.len() > 1 && word.starts_with('@'));
    let options = options.iter().map(|word| {
        let (name, value) = word[1..].split_once(':').unwrap_or((&word[1..], ""));
        (name.to_owned(), value.to_owned())
    });
    let mut rc = "0".to_owned();
    let mut expected = Vec::new();
    for result in lists(results) {
        match result.as_slice() {
            [word, value] if word == "rc" => rc = value.clone(),
            _ => expected.extend(repeated(result, false)?),
        }
    }
    let mut items = Vec::new();
    for item in lists(&words) {
        items.extend(repeated(item, true)?);
    }
    Ok(Call {
        verb: (*verb).to_owned(),
        items,
        options: options.collect(),
        results: expected,
        rc,
    })
}

/// Words parted by semicolons.
fn lists(words: &[&str]) -> Vec<Vec<String>> {
    words
        .split(|word| *word == ";")
        .map(|list| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
        .filter(|list| !list.is_empty())
        .collect()
}

/// Unrolls `... xN`, counting words that end in `..` up and ranges `k0..9` through.
fn repeated(mut list: Vec<String>, counting: bool) -> Result<Vec<Vec<String>>, String> {
    if counting && let Some(position) = list.iter().position(|word| is_range(word)) {
        let (first, last) = list[position].split_once("..").ok_or("a range")?;
        let name = first.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned();
        let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text} is no number"));
        let range = number(&first[name.len()..])?..=number(last)?;
        return Ok(range
            .map(|n| {
                let mut list = list.clone();
                list[position] = format!("{name}{n}");
                list
            })
            .collect());
    }
    let times = list
        .last()
        .and_then(|word| word.strip_prefix('x')?.parse::<u32>().ok());
    let Some(times) = times else {
        return Ok(vec![list]);
    };
    list.pop();
    let count = |word: &String, n: u32| -> Result<String, String> {
        let Some(start) = word.strip_suffix("..").filter(|_| counting) else {
            return Ok(word.clone());
        };
        let digits = start.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let first: u32 = start[digits..]
            .parse()
            .map_err(|_| format!("{word} does not count"))?;
        Ok(format!("{}{}", &start[..digits], first + n))
    };
    (0..times)
        .map(|n| list.iter().map(|word| count(word, n)).collect())
        .collect()
}

fn is_range(word: &str) -> bool {
    word.split_once("..")
        .is_some_and(|(_, last)| !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()))
}
