//! The C compiler that judges, and the headers it reads.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use gnttab_abi::Abi;

/// A calling ABI as a C compiler sees it.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) abi: Abi,
    /// Commands to try; the first that compiles anything is taken.
    compilers: &'static [&'static [&'static str]],
}

/// The headers choose their Arm half by the compiler's own macros. Where no Arm compiler is
/// installed the host's poses as one: x86_64 lays these structures out as AArch64 does, and i386
/// with 8-aligned 64-bit integers as AArch32.
pub(crate) const TARGETS: [Target; 4] = [
    Target {
        name: "x86_64",
        abi: Abi::X86_64,
        compilers: &[
            &["cc", "-m64"],
            &["x86_64-linux-gnu-gcc"],
            &["clang", "--target=x86_64-linux-gnu"],
        ],
    },
    Target {
        name: "x86_32",
        abi: Abi::X86_32,
        compilers: &[
            &["cc", "-m32"],
            &["i686-linux-gnu-gcc"],
            &["clang", "--target=i686-linux-gnu"],
        ],
    },
    Target {
        name: "aarch64",
        abi: Abi::Arm,
        compilers: &[
            &["aarch64-linux-gnu-gcc"],
            &["clang", "--target=aarch64-linux-gnu"],
            &["cc", "-m64", "-U__x86_64__", "-D__aarch64__"],
        ],
    },
    Target {
        name: "arm",
        abi: Abi::Arm,
        compilers: &[
            &["arm-linux-gnueabihf-gcc"],
            &["clang", "--target=armv7-linux-gnueabihf"],
            &["cc", "-m32", "-malign-double", "-U__i386__", "-D__arm__"],
        ],
    },
];

/// The newest interface version that the headers at hand have.
pub(crate) const LATEST: &str = "__XEN_LATEST_INTERFACE_VERSION__";

pub(crate) const INCLUDES: &str = "\
#include <stddef.h>
#include <stdint.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/memory.h>
#include <xen/features.h>
#include <xen/errno.h>
";

/// The headers and a compiler that can read them for one ABI.
pub(crate) struct Compiler {
    command: &'static [&'static str],
    pub(crate) include: PathBuf,
}

impl Compiler {
    /// Looks for both, and says on standard error which one it is that lacks.
    pub(crate) fn find(target: &Target) -> Option<Compiler> {
        let skip = |why: String| {
            // Not `eprintln`: the harness hides that of a test that passes.
            let _ = writeln!(std::io::stderr(), "c_headers: {} skipped: {why}", target.name);
            None
        };
        let include =
            PathBuf::from(std::env::var_os("GNTTAB_XEN_INCLUDE").unwrap_or_else(|| "/usr/include".into()));
        if !include.join("xen/grant_table.h").exists() {
            let place = include.display();
            return skip(format!(
                "no xen/grant_table.h in {place}; `apt install libxen-dev` brings it"
            ));
        }
        let works = |command: &&&'static [&'static str]| {
            let probe = Compiler {
                command,
                include: include.clone(),
            };
            probe
                .run(LATEST, &["-fsyntax-only"], "#include <stdint.h>\n")
                .is_ok()
        };
        let Some(command) = target.compilers.iter().find(works).copied() else {
            return skip(format!("none of {:?} works here", target.compilers));
        };
        Some(Compiler { command, include })
    }

    /// Runs the compiler on `source`: its output, or its complaints.
    pub(crate) fn run(&self, interface: &str, mode: &[&str], source: &str) -> Result<String, String> {
        let mut child = Command::new(self.command[0])
            .args(&self.command[1..])
            .args(["-std=gnu11", "-ffreestanding", "-x", "c"])
            .arg("-idirafter")
            .arg(&self.include)
            .arg(format!("-D__XEN_INTERFACE_VERSION__={interface}"))
            .args(mode)
            .arg("-")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut stdin = child.stdin.take().expect("stdin is piped");
        stdin
            .write_all(source.as_bytes())
            .map_err(|error| error.to_string())?;
        drop(stdin);
        let output = child.wait_with_output().map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Whether the headers and this behind them compile.
    pub(crate) fn accepts(&self, interface: &str, source: &str) -> Result<(), String> {
        let source = format!("{INCLUDES}{source}");
        self.run(interface, &["-fsyntax-only", "-Wall", "-Werror"], &source)
            .map(drop)
    }

    /// The macros that the headers define.
    pub(crate) fn macros(&self, interface: &str) -> BTreeSet<String> {
        let text = self
            .run(interface, &["-E", "-dM"], INCLUDES)
            .expect("the headers preprocess");
        let names = text
            .lines()
            .filter_map(|line| line.strip_prefix("#define ")?.split([' ', '(']).next());
        names.map(str::to_owned).collect()
    }
}
