//! `gnttab bench disk`: our block path beside the file itself, and our export beside qemu's.
//!
//! Every target serves a copy of its own of one image in memory, all of whose blocks are written. Rounds take turns
//! over the targets, so that whatever else the machine does disturbs all of them; what counts is a target's best round.
//! fio is the client of all that speak NBD; on the way from domain to domain it cannot be, so a frontend does the
//! same accesses by itself.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::load::Pattern;
use super::pair::{self, Cost};
use crate::args::BenchDisk;
use crate::failure::Failure;
use crate::output;
use crate::roles::Sharing;

/// Bytes of the image.
const SIZE: u64 = 256 << 20;

/// How long a server may take until it lets clients in.
const READY: Duration = Duration::from_secs(10);

const PATTERNS: [Pattern; 6] = [
    pattern(false, true, 4096, 1),
    pattern(false, true, 4096, 32),
    pattern(true, true, 4096, 1),
    pattern(true, true, 4096, 32),
    pattern(false, false, 128 << 10, 8),
    pattern(true, false, 128 << 10, 8),
];

const fn pattern(write: bool, random: bool, length: u32, depth: u32) -> Pattern {
    Pattern {
        write,
        random,
        length,
        depth,
    }
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// fio on the file: the limit.
    File,
    /// A frontend domain whose backend domain has the file.
    Domains,
    /// `gnttab disk`.
    Gnttab,
    QemuNbd,
    QemuStorageDaemon,
}

impl Target {
    const ALL: [Target; 5] = [
        Target::File,
        Target::Domains,
        Target::Gnttab,
        Target::QemuNbd,
        Target::QemuStorageDaemon,
    ];

    fn name(self) -> &'static str {
        match self {
            Target::File => "file, fio io_uring",
            Target::Domains => "domain to domain",
            Target::Gnttab => "gnttab disk, NBD",
            Target::QemuNbd => "qemu-nbd",
            Target::QemuStorageDaemon => "qemu-storage-daemon",
        }
    }

    /// What it is held against.
    fn rival(self) -> Option<Target> {
        match self {
            Target::File | Target::QemuNbd => None,
            Target::Domains => Some(Target::File),
            Target::Gnttab | Target::QemuStorageDaemon => Some(Target::QemuNbd),
        }
    }
}

pub(crate) fn main(args: &BenchDisk) -> Result<(), Failure> {
    for tool in ["fio", "nbdcopy", "qemu-nbd", "qemu-storage-daemon"] {
        has(tool)?;
    }
    let (rounds, time) = if args.quick {
        (1, Duration::from_millis(400))
    } else {
        (3, Duration::from_secs(2))
    };
    let folder = Folder::new()?;
    let bench = Bench::start(&folder, time)?;
    let mut results = Vec::new();
    for target in Target::ALL {
        results.push((target, vec![Vec::new(); PATTERNS.len() + COPIES.len()]));
    }
    let mut costs = [Cost::default(); PATTERNS.len()];
    for round in 1..=rounds {
        output::say(&format!("round {round} of {rounds}"));
        for (target, rates) in &mut results {
            if *target == Target::Domains {
                bench.domains(rates, &mut costs)?;
            } else {
                bench.round(*target, rates)?;
            }
        }
        bench.copies(&mut results)?;
    }
    report(args, &results, &costs);
    Ok(())
}

/// Copies of the whole image, as `nbdcopy` does them.
const COPIES: [&str; 2] = ["nbdcopy, from", "nbdcopy, to"];

/// The rates of a target in each round, by pattern; then those of the copies.
type Rates = Vec<Vec<f64>>;

struct Bench {
    time: Duration,
    images: Vec<(Target, PathBuf)>,
    servers: Vec<Served>,
}

/// A server, ended when dropped.
struct Served {
    target: Target,
    child: Child,
    uri: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _ = self.child.wait();
    }
}

impl Bench {
    fn start(folder: &Folder, time: Duration) -> Result<Self, Failure> {
        let mut bench = Bench {
            time,
            images: Vec::new(),
            servers: Vec::new(),
        };
        for (target, number) in Target::ALL.into_iter().zip(0..) {
            let path = folder.path(&format!("{number}.img"));
            fill(&path).map_err(|error| Failure::new(format!("image {}: {error}", path.display())))?;
            let socket = folder.path(&format!("{number}.sock"));
            if let Some((command, export)) = server(target, &path, &socket)? {
                bench.servers.push(serve(target, command, &socket, export)?);
            }
            bench.images.push((target, path));
        }
        Ok(bench)
    }

    fn image(&self, target: Target) -> Result<&Path, Failure> {
        let found = self.images.iter().find(|(of, _)| *of == target);
        found
            .map(|(_, path)| path.as_path())
            .ok_or_else(|| Failure::new("no image"))
    }

    /// Each pattern with two domains of its own, so that what it costs them can be told; kept is that of the best round.
    fn domains(&self, rates: &mut Rates, costs: &mut [Cost]) -> Result<(), Failure> {
        let image = self.image(Target::Domains)?;
        for ((rates, cost), pattern) in rates.iter_mut().zip(costs).zip(PATTERNS) {
            let outcome = pair::measure(image, Sharing::Persistent, &[pattern], self.time)?;
            for pace in outcome.paces {
                let rate = pace.requests as f64 / pace.seconds;
                if best(rates).is_none_or(|best| rate > best) {
                    *cost = outcome.cost;
                }
                rates.push(rate);
            }
        }
        Ok(())
    }

    fn round(&self, target: Target, rates: &mut Rates) -> Result<(), Failure> {
        let served = self.servers.iter().find(|served| served.target == target);
        let source = match served {
            Some(served) => ["--ioengine=nbd".to_owned(), format!("--uri={}", served.uri)],
            None => [
                "--ioengine=io_uring".to_owned(),
                format!("--filename={}", self.image(target)?.display()),
            ],
        };
        for (rates, pattern) in rates.iter_mut().zip(PATTERNS) {
            rates.push(fio(&source, pattern, self.time)?);
        }
        Ok(())
    }

    /// A copy is short, and as good as its luck: from each server in turns, again and again for as long as a pattern takes
    /// with each; and then to each.
    fn copies(&self, results: &mut [(Target, Rates)]) -> Result<(), Failure> {
        let plain = self.image(Target::File)?;
        let servers = u32::try_from(self.servers.len()).unwrap_or(1);
        for way in 0..COPIES.len() {
            let round = Instant::now();
            while round.elapsed() < self.time * servers {
                for served in &self.servers {
                    let uri = Path::new(&served.uri);
                    let places = [[uri, Path::new("null:")], [plain, uri]][way];
                    let start = Instant::now();
                    done(Command::new("nbdcopy").args(places), "nbdcopy")?;
                    let rate = SIZE as f64 / start.elapsed().as_secs_f64();
                    for (_, rates) in results.iter_mut().filter(|(of, _)| *of == served.target) {
                        rates[PATTERNS.len() + way].push(rate);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A folder in memory, removed when dropped.
pub(super) struct Folder(PathBuf);

impl Folder {
    /// The path of a file in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn new() -> Result<Self, Failure> {
        let path = PathBuf::from(format!("/dev/shm/gnttab-bench-{}", std::process::id()));
        std::fs::create_dir(&path)
            .map_err(|error| Failure::new(format!("folder {}: {error}", path.display())))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Writes every block of an image.
pub(super) fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0; 1 << 20];
    let mut state = 1_u64;
    for _ in 0..SIZE >> 20 {
        for word in block.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    Ok(())
}

fn has(tool: &str) -> Result<(), Failure> {
    let there = Command::new(tool)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if there {
        return Ok(());
    }
    Err(Failure::new(format!("{tool} is not installed"))
        .next("on Debian: apt-get install fio libnbd-bin qemu-utils qemu-system-common"))
}

/// How to serve an image, and the export's name in its URI.
fn server(target: Target, image: &Path, socket: &Path) -> Result<Option<(Command, &'static str)>, Failure> {
    let served = match target {
        Target::File | Target::Domains => return Ok(None),
        Target::Gnttab => {
            let own = std::env::current_exe()
                .map_err(|error| Failure::new(format!("this program's own file: {error}")))?;
            let mut command = Command::new(own);
            command.arg("disk").arg(image).arg("--socket").arg(socket);
            (command, "")
        }
        Target::QemuNbd => {
            let mut command = Command::new("qemu-nbd");
            command.args(["--format=raw", "--persistent", "--shared=16", "--cache=writeback"]);
            command.arg("--socket").arg(socket).arg(image);
            (command, "")
        }
        Target::QemuStorageDaemon => {
            let mut command = Command::new("qemu-storage-daemon");
            command.arg("--blockdev");
            command.arg(format!(
                "driver=file,node-name=image,filename={}",
                image.display()
            ));
            command.arg("--nbd-server");
            command.arg(format!("addr.type=unix,addr.path={}", socket.display()));
            command.args(["--export", "nbd,id=export,node-name=image,writable=on"]);
            (command, "image")
        }
    };
    Ok(Some(served))
}

fn serve(target: Target, mut command: Command, socket: &Path, export: &str) -> Result<Served, Failure> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Failure::new(format!("{}: {error}", target.name())))?;
    let served = Served {
        target,
        child,
        uri: format!("nbd+unix:///{export}?socket={}", socket.display()),
    };
    let started = Instant::now();
    while UnixStream::connect(socket).is_err() {
        if started.elapsed() > READY {
            return Err(Failure::new(format!("{} lets nobody in", target.name())));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(served)
}

/// Runs a command to its end; what it said on standard output.
fn done(command: &mut Command, name: &str) -> Result<Vec<u8>, Failure> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure::new(format!("{name}: {error}")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default().to_owned();
    Err(Failure::new(format!("{name}: {}: {last}", output.status)))
}

/// Accesses a second.
fn fio(source: &[String], pattern: Pattern, time: Duration) -> Result<f64, Failure> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--time_based", "--output-format=json", "--thread"]);
    command.args(source);
    command.arg(format!("--rw={}", pattern.fio()));
    command.arg(format!("--bs={}", pattern.length));
    command.arg(format!("--iodepth={}", pattern.depth));
    command.arg(format!("--size={SIZE}"));
    command.arg(format!("--ramp_time={}ms", (time / 4).as_millis()));
    command.arg(format!("--runtime={}ms", time.as_millis()));
    let said = done(&mut command, "fio")?;
    // Some engines put a line of their own before the JSON.
    let start = said.iter().position(|&byte| byte == b'{').unwrap_or(0);
    let direction = if pattern.write { "write" } else { "read" };
    serde_json::from_slice::<Value>(&said[start..])
        .ok()
        .and_then(|said| said["jobs"][0][direction]["iops"].as_f64())
        .ok_or_else(|| Failure::new(format!("fio: said nothing about its {direction}s")))
}

fn best(rates: &[f64]) -> Option<f64> {
    rates.iter().copied().max_by(f64::total_cmp)
}

/// How far the best round lies above the median: above one half, the machine was too busy for the figure to be quoted.
pub(super) fn spread(rates: &[f64]) -> f64 {
    match (best(rates), median(rates)) {
        (Some(best), median) if median > 0.0 => best / median - 1.0,
        _ => 0.0,
    }
}

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn report(args: &BenchDisk, results: &[(Target, Rates)], costs: &[Cost]) {
    let rates_of = |target: Target, at: usize| {
        let (_, rates) = results.iter().find(|(of, _)| *of == target)?;
        rates.get(at)
    };
    let mut cases = Vec::new();
    let names = PATTERNS
        .iter()
        .map(ToString::to_string)
        .chain(COPIES.map(str::to_owned));
    for (at, name) in names.enumerate() {
        for (target, rates) in results {
            let Some(rate) = best(&rates[at]) else { continue };
            let rival = target.rival().and_then(|rival| {
                let theirs = rates_of(rival, at)?;
                let medians = median(&rates[at]) / median(theirs);
                Some((rival, rate / best(theirs)?, medians))
            });
            cases.push(Case {
                name: name.clone(),
                length: PATTERNS.get(at).map_or(1, |pattern| u64::from(pattern.length)),
                target: *target,
                rate,
                rounds: rates[at].clone(),
                rival,
                cost: costs.get(at).filter(|_| *target == Target::Domains).copied(),
            });
        }
    }
    if args.json {
        let cases: Vec<Value> = cases.iter().map(Case::to_json).collect();
        output::json("bench disk", json!({ "image_bytes": SIZE, "cases": cases }));
        return;
    }
    for case in &cases {
        output::line(&case.line());
    }
}

/// A target's figure for one pattern.
struct Case {
    name: String,
    length: u64,
    target: Target,
    /// Accesses a second; bytes a second for a copy of the whole.
    rate: f64,
    rounds: Vec<f64>,
    /// What it is held against, as a ratio of the best rounds and of the median ones.
    rival: Option<(Target, f64, f64)>,
    /// From domain to domain, a request of the ring.
    cost: Option<Cost>,
}

impl Case {
    fn mebibytes(&self) -> f64 {
        self.rate * self.length as f64 / f64::from(1 << 20)
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "target": self.target.name(),
            "per_second": self.rate,
            "mebibytes_per_second": self.mebibytes(),
            "rounds": self.rounds,
            "spread": spread(&self.rounds),
            "compared_with": self.rival.map(|(rival, ..)| rival.name()),
            "ratio": self.rival.map(|(_, best, _)| best),
            "ratio_of_medians": self.rival.map(|(.., medians)| medians),
            "cost": self.cost.map(Cost::to_json),
        })
    }

    fn line(&self) -> String {
        let rate = if self.length == 1 {
            String::new()
        } else {
            format!("{:.0} a second", self.rate)
        };
        let ratio = self
            .rival
            .map(|(rival, best, medians)| format!("{best:.2} x {}, median {medians:.2}", rival.name()))
            .unwrap_or_default();
        let wide = if spread(&self.rounds) > 0.5 { " (wide)" } else { "" };
        let cost = self.cost.map(|cost| format!("; {cost}")).unwrap_or_default();
        let line = format!(
            "{:<22} {:<20} {rate:>16} {:>7.0} MiB/s  {ratio}{wide}{cost}",
            self.name,
            self.target.name(),
            self.mebibytes()
        );
        line.trim_end().to_owned()
    }
}
