//! `gnttab man` and `gnttab completions`: manual pages and completions, from the parser itself.

use std::io::{self, Write as _};
use std::path::Path;

use clap::{Command, CommandFactory as _};

use crate::args::{Cli, Completions, Man};
use crate::failure::Failure;

/// Prints a shell's completions.
pub(crate) fn completions(args: &Completions) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "gnttab", &mut text);
    print(&text)
}

/// Prints a page, or writes them all.
pub(crate) fn main(args: &Man) -> Result<(), Failure> {
    let pages = pages();
    if let Some(folder) = &args.to {
        return write_all(folder, &pages);
    }
    let wanted = args
        .part
        .as_ref()
        .map_or_else(|| "gnttab".to_owned(), |part| format!("gnttab-{part}"));
    let Some((_, page)) = pages.iter().find(|(name, _)| *name == wanted) else {
        let all: Vec<&str> = pages
            .iter()
            .filter_map(|(name, _)| name.strip_prefix("gnttab-"))
            .collect();
        return Err(Failure::wrong_use(format!("there is no page of '{wanted}'"))
            .next(format!("there are: {}", all.join(", "))));
    };
    print(page)
}

/// Every page with its name, the whole command's first.
fn pages() -> Vec<(String, Vec<u8>)> {
    let mut whole = Cli::command();
    whole.build();
    let page = |command: &Command, name: String| {
        let mut page = Vec::new();
        // Writing to memory does not fail.
        let _ = render(command, &mut page);
        (name, page)
    };
    let parts = whole.get_subcommands().filter(|part| !part.is_hide_set());
    let parts: Vec<_> = parts
        .map(|part| page(part, format!("gnttab-{}", part.get_name())))
        .collect();
    std::iter::once(page(&whole, "gnttab".to_owned()))
        .chain(parts)
        .collect()
}

fn render(command: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    let examples = command.get_before_help().map(ToString::to_string);
    let man = clap_mangen::Man::new(command.clone())
        .source(concat!("gnttab ", env!("CARGO_PKG_VERSION")))
        .manual("Grant tables");
    man.render_title(page)?;
    man.render_name_section(page)?;
    if let Some(examples) = examples {
        writeln!(page, ".SH EXAMPLES\n.nf")?;
        for line in examples.lines().skip_while(|line| line.trim() == "Examples:") {
            writeln!(page, "{}", literal(line))?;
        }
        writeln!(page, ".fi")?;
    }
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(page)?;
    }
    man.render_extra_section(page)
}

/// A line as roff prints it unchanged.
fn literal(line: &str) -> String {
    let text = line
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq");
    format!("\\&{text}")
}

fn write_all(folder: &Path, pages: &[(String, Vec<u8>)]) -> Result<(), Failure> {
    for (name, page) in pages {
        let path = folder.join(format!("{name}.1"));
        std::fs::write(&path, page).map_err(|error| {
            Failure::new(format!("{}: {error}", path.display())).next("give a folder that you may write")
        })?;
    }
    Ok(())
}

fn print(text: &[u8]) -> Result<(), Failure> {
    // With nobody to read it there is nothing to be done.
    let mut out = io::stdout().lock();
    let _ = out.write_all(text).and_then(|()| out.flush());
    Ok(())
}
