//! The world in which a real Xen answers: the emulator, and the mailbox in its memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use gnttab_conformance::mailbox::{
    CLEAN, GREETING, HYPERCALLS, IN_BYTES, IN_FRAMES, IN_PAGES, KIND, MEET, Meeting, OUT_FRAMES, OUT_PAGES,
    OUT_WORDS, PEEK, PLAYED, PLAYING, REQUEST, RESPONSE, SCRATCH_FRAMES, SCRIPTS,
};
use gnttab_conformance::puppet::AREA_PAGES;

use crate::engine_world::Settings;

/// Bytes of memory of the emulated machine.
const MEMORY: &str = "256M";
/// How long an answer is waited for without sleeping.
const IMPATIENCE: Duration = Duration::from_millis(2);
/// The hypercall that tells the hypervisor's version.
const XEN_VERSION: u64 = 17;
/// How long it may take from start to greeting.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to answer a batch.
const PATIENCE: Duration = Duration::from_secs(60);

/// A real Xen could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum XenError {
    /// Something could not be read or written.
    #[error("{what}: {why}")]
    Io {
        /// What.
        what: String,
        /// The system's reason.
        why: std::io::Error,
    },
    /// The list of accepted differences cannot be read.
    #[error("docs/differences.json: {0}")]
    List(#[from] serde_json::Error),
    /// The emulator is not there.
    #[error(
        "{0} is not there: install qemu-system-x86, or name an emulator with --qemu; conformance/fetch FOLDER \
         gets one beside what is installed"
    )]
    NoEmulator(PathBuf),
    /// The hypervisor is not there.
    #[error(
        "{0} is no hypervisor: install xen-hypervisor-4.17-amd64, then \
         zcat /boot/xen-4.17-amd64.gz > xen, and name that file with --xen; conformance/fetch FOLDER gets it \
         beside what is installed"
    )]
    NoHypervisor(PathBuf),
    /// The kernel could not be built.
    #[error("conformance/guest could not be built:\n{0}")]
    Build(String),
    /// A domain could not be made.
    #[error("domain {domain} could not be made: {what} returned {result}")]
    Domain {
        /// Which.
        domain: u16,
        /// By what.
        what: &'static str,
        /// What the hypercall returned.
        result: i64,
    },
    /// The machine said no more.
    #[error(
        "the machine did not answer within {seconds} s, at script {script} of the batch; its console ended \
         with:\n{console}"
    )]
    Silent {
        /// Which script it was playing.
        script: u64,
        /// How long it had.
        seconds: u64,
        /// The last lines of its console.
        console: String,
    },
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> XenError {
    let what = what.into();
    |why| XenError::Io { what, why }
}

/// What is needed to start a machine.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) qemu: PathBuf,
    pub(crate) xen: PathBuf,
    pub(crate) kernel: PathBuf,
}

/// Builds the kernel.
pub(crate) fn build_kernel() -> Result<PathBuf, XenError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| folder.join("../target"), PathBuf::from)
        .join("guest");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--manifest-path"])
        .arg(folder.join("guest/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env_remove("RUSTFLAGS")
        .output()
        .map_err(io("cargo"))?;
    if !built.status.success() {
        return Err(XenError::Build(
            String::from_utf8_lossy(&built.stderr).into_owned(),
        ));
    }
    Ok(target.join("release/gnttab-conformance-guest"))
}

/// A running machine, ended when dropped.
pub(crate) struct RealXen {
    machine: Child,
    memory: File,
    memory_path: PathBuf,
    console: mpsc::Receiver<String>,
    last_lines: Vec<String>,
    header: u64,
    input: Vec<u64>,
    output: Vec<u64>,
    /// Frames of the kernel's pages for arguments, then of those for lists.
    pub(crate) scratch: Vec<u64>,
    /// Version of the hypervisor: major in the upper half.
    pub(crate) version: u32,
    number: u64,
}

/// The answer to a batch.
pub(crate) struct Answers {
    /// Every script left everything clean.
    pub(crate) clean: bool,
    /// For each script that was played, its words.
    pub(crate) scripts: Vec<Vec<u64>>,
}

impl RealXen {
    /// Starts a machine; a busy computer may need more than one try.
    pub(crate) fn start(tools: &Tools, settings: Settings, more: &str) -> Result<RealXen, XenError> {
        const TRIES: u32 = 3;
        let mut tried = 1;
        loop {
            match RealXen::try_start(tools, settings, more) {
                Err(XenError::Silent { .. }) if tried < TRIES => tried += 1,
                done => return done,
            }
        }
    }

    /// Starts a machine, with more words for the hypervisor's command line, and waits for its kernel.
    fn try_start(tools: &Tools, settings: Settings, more: &str) -> Result<RealXen, XenError> {
        let mut magic = [0; 4];
        let read = File::open(&tools.xen).and_then(|mut file| file.read_exact(&mut magic));
        if read.is_err() || magic != *b"\x7fELF" {
            return Err(XenError::NoHypervisor(tools.xen.clone()));
        }
        let memory_path = memory_path();
        let options = format!(
            "console=com1 com1=115200,8n1 dom0_mem=64M dom0_max_vcpus=1 spec-ctrl=no xpti=no loglvl=warning guest_loglvl=none \
             watchdog=0 gnttab_max_frames={} gnttab_max_maptrack_frames={}{more}",
            settings.max_frames, settings.max_maptrack_frames
        );
        let mut machine = Command::new(&tools.qemu)
            .args(["-accel", "tcg", "-cpu", "qemu64,+svm", "-smp", "1", "-m", MEMORY])
            .args(["-machine", "pc,memory-backend=ram", "-object"])
            .arg(format!(
                "memory-backend-file,id=ram,size={MEMORY},share=on,mem-path={}",
                memory_path.display()
            ))
            .args(["-display", "none", "-vga", "none", "-net", "none", "-no-reboot"])
            .args([
                "-serial", "stdio", "-monitor", "none", "-append", &options, "-kernel",
            ])
            .arg(&tools.xen)
            .arg("-initrd")
            .arg(&tools.kernel)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|_| XenError::NoEmulator(tools.qemu.clone()))?;
        let output = machine.stdout.take();
        let (say, console) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output
                .into_iter()
                .flat_map(|output| BufReader::new(output).lines())
            {
                let Ok(line) = line else { break };
                if say.send(line).is_err() {
                    break;
                }
            }
        });
        let started = Instant::now();
        let mut last_lines = Vec::new();
        let header = loop {
            match console.recv_timeout(START_PATIENCE.saturating_sub(started.elapsed())) {
                Ok(line) => {
                    if let Some((_, frame)) = line.split_once(GREETING) {
                        break u64::from_str_radix(frame.trim(), 16).unwrap_or(0) * 4096;
                    }
                    last_lines.push(line);
                }
                Err(_) => {
                    let _ = machine.kill();
                    let _ = machine.wait();
                    let _ = std::fs::remove_file(&memory_path);
                    return Err(silent(0, &last_lines));
                }
            }
        };
        let memory = File::options()
            .read(true)
            .write(true)
            .open(&memory_path)
            .map_err(io(memory_path.display().to_string()))?;
        let mut xen = RealXen {
            machine,
            memory,
            memory_path,
            console,
            last_lines,
            header,
            input: Vec::new(),
            output: Vec::new(),
            scratch: Vec::new(),
            version: 0,
            number: 0,
        };
        for page in 0..IN_PAGES {
            let frame = xen.word(IN_FRAMES + page)?;
            xen.input.push(frame);
        }
        for page in 0..OUT_PAGES {
            let frame = xen.word(OUT_FRAMES + page)?;
            xen.output.push(frame);
        }
        for page in 0..2 * AREA_PAGES {
            let frame = xen.word(SCRATCH_FRAMES + page)?;
            xen.scratch.push(frame);
        }
        let version = xen.hypercall([XEN_VERSION, 0, 0, 0, 0, 0])?;
        xen.version = u32::try_from(version).unwrap_or(0);
        Ok(xen)
    }

    /// Bytes of the machine's memory.
    pub(crate) fn read(&self, machine_addr: u64, into: &mut [u8]) -> Result<(), XenError> {
        let done = self.memory.read_exact_at(into, machine_addr);
        done.map_err(io("the machine's memory"))
    }

    /// Stores into the machine's memory.
    pub(crate) fn write(&self, machine_addr: u64, bytes: &[u8]) -> Result<(), XenError> {
        let done = self.memory.write_all_at(bytes, machine_addr);
        done.map_err(io("the machine's memory"))
    }

    /// Has the kernel make hypercalls, number and five arguments each; their results.
    pub(crate) fn hypercalls(&mut self, calls: &[[u64; 6]]) -> Result<Vec<i64>, XenError> {
        let bytes: Vec<u8> = calls
            .iter()
            .flatten()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        self.hand_over(HYPERCALLS, &bytes)?;
        self.wait()?;
        Ok(self.output_words()?.into_iter().map(u64::cast_signed).collect())
    }

    /// Has the kernel make one hypercall.
    pub(crate) fn hypercall(&mut self, call: [u64; 6]) -> Result<i64, XenError> {
        Ok(self.hypercalls(&[call])?.first().copied().unwrap_or(i64::MIN))
    }

    /// A word of the kernel's address space.
    pub(crate) fn peek(&mut self, addr: u64) -> Result<u64, XenError> {
        Ok(self.hypercall([PEEK, addr, 0, 0, 0, 0])?.cast_unsigned())
    }

    /// Tells the kernel of the second domain.
    pub(crate) fn introduce(&mut self, other: &Meeting) -> Result<(), XenError> {
        let words = other.to_words();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.hand_over(MEET, &bytes)?;
        self.wait()
    }

    fn word(&self, word: usize) -> Result<u64, XenError> {
        let mut bytes = [0; 8];
        self.memory
            .read_exact_at(&mut bytes, self.header + word as u64 * 8)
            .map_err(io("the machine's memory"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set_word(&self, word: usize, value: u64) -> Result<(), XenError> {
        self.memory
            .write_all_at(&value.to_le_bytes(), self.header + word as u64 * 8)
            .map_err(io("the machine's memory"))
    }

    /// Hands a batch over; [`RealXen::answers`] waits for it.
    pub(crate) fn ask<'s>(
        &mut self,
        scripts: impl Iterator<Item = &'s [u8]>,
        verbose: bool,
    ) -> Result<(), XenError> {
        let mut bytes = Vec::new();
        for script in scripts {
            let length = u32::try_from(script.len() + 1).unwrap_or(u32::MAX);
            bytes.extend(length.to_le_bytes());
            bytes.push(u8::from(verbose));
            bytes.extend(script);
        }
        self.hand_over(SCRIPTS, &bytes)
    }

    fn hand_over(&mut self, kind: u64, bytes: &[u8]) -> Result<(), XenError> {
        assert!(bytes.len() <= IN_PAGES * 4096, "a batch of {} bytes", bytes.len());
        for (frame, chunk) in self.input.iter().zip(bytes.chunks(4096)) {
            self.write(frame * 4096, chunk)?;
        }
        self.set_word(IN_BYTES, bytes.len() as u64)?;
        self.set_word(KIND, kind)?;
        self.number += 1;
        self.set_word(REQUEST, self.number)
    }

    /// Waits for the answer to what was handed over.
    fn wait(&mut self) -> Result<(), XenError> {
        let started = Instant::now();
        while self.word(RESPONSE)? != self.number {
            if started.elapsed() < IMPATIENCE {
                std::thread::yield_now();
                continue;
            }
            let ended = self.machine.try_wait().map_err(io("the emulator"))?.is_some();
            if ended || started.elapsed() > PATIENCE {
                self.last_lines.extend(self.console.try_iter());
                return Err(silent(self.word(PLAYING)?, &self.last_lines));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn output_words(&self) -> Result<Vec<u64>, XenError> {
        let words = self.word(OUT_WORDS)?;
        let mut output = vec![0; usize::try_from(words).unwrap_or(0) * 8];
        for (frame, chunk) in self.output.iter().zip(output.chunks_mut(4096)) {
            self.read(frame * 4096, chunk)?;
        }
        let (words, _) = output.as_chunks::<8>();
        Ok(words.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
    }

    /// The answer to what was asked.
    pub(crate) fn answers(&mut self) -> Result<Answers, XenError> {
        self.wait()?;
        let played = self.word(PLAYED)?;
        let mut words = self.output_words()?.into_iter();
        let mut scripts = Vec::new();
        for _ in 0..played {
            let count = usize::try_from(words.next().unwrap_or(0)).unwrap_or(0);
            scripts.push(words.by_ref().take(count).collect());
        }
        let clean = self.word(CLEAN)? == 1;
        Ok(Answers { clean, scripts })
    }
}

fn memory_path() -> PathBuf {
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() {
        shared.to_path_buf()
    } else {
        std::env::temp_dir()
    };
    static MACHINES: AtomicU32 = AtomicU32::new(0);
    let machine = MACHINES.fetch_add(1, Ordering::Relaxed);
    folder.join(format!("gnttab-conformance-{}-{machine}", std::process::id()))
}

fn silent(script: u64, lines: &[String]) -> XenError {
    let from = lines.len().saturating_sub(12);
    XenError::Silent {
        script,
        seconds: PATIENCE.as_secs(),
        console: lines[from..].join("\n"),
    }
}

impl Drop for RealXen {
    fn drop(&mut self) {
        let _ = self.machine.kill();
        let _ = self.machine.wait();
        let _ = std::fs::remove_file(&self.memory_path);
    }
}
