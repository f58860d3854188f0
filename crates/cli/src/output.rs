//! What goes to standard output (data) and standard error (talk), and how numbers look.

use std::io::{IsTerminal as _, Write as _};

/// Goes into every piece of JSON: raised when a key changes its meaning or goes, not when one is added.
const JSON_VERSION: u32 = 1;

/// Prints one JSON object on one line: `fields` behind the version and the command's name. `false` when nobody reads it any
/// more.
pub(crate) fn json(command: &str, fields: serde_json::Value) -> bool {
    let mut object = serde_json::Map::new();
    object.insert("version".to_owned(), JSON_VERSION.into());
    object.insert("command".to_owned(), command.into());
    if let serde_json::Value::Object(fields) = fields {
        object.extend(fields);
    }
    line(&serde_json::Value::Object(object).to_string())
}

/// Prints one line of data. `false` when nobody reads it any more.
pub(crate) fn line(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// Says one line to the person, if one is there to read it.
pub(crate) fn say(text: &str) {
    // With standard error gone there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Whether standard output is a terminal.
pub(crate) fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether to use colour on standard output.
pub(crate) fn colour_on_stdout() -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::io::stdout().is_terminal() && !no_color && !dumb
}

/// Whether lines on standard error can be drawn over.
pub(crate) fn stderr_is_live() -> bool {
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::io::stderr().is_terminal() && !dumb
}

/// Bytes for people: three digits at least, binary units.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // What is lost in the conversion is not shown.
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() < 0.05 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `1 domain`, `2 domains`.
pub(crate) fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Rows as lines of aligned columns, each line indented by two blanks; the columns in `right` are aligned right.
pub(crate) fn columns<const N: usize>(
    rows: impl IntoIterator<Item = [String; N]>,
    right: &[usize],
) -> String {
    let rows: Vec<[String; N]> = rows.into_iter().collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let mut line = String::from(" ");
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let padding = " ".repeat(width - cell.chars().count());
            let (before, after) = if right.contains(&column) {
                (&*padding, "")
            } else {
                ("", &*padding)
            };
            line.extend([" ", if column > 0 { " " } else { "" }, before, cell, after]);
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["d1", "9", "x"], ["d10", "100", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(columns(rows, &[1]), "  d1     9  x\n  d10  100\n");
    }

    #[test]
    fn bytes_are_short() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(4096), "4 KiB");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(256 << 20), "256 MiB");
        assert_eq!(bytes(1 << 40), "1 TiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
    }
}
