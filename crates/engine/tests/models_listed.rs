//! `docs/models.md` lists the models that there are, and says of each what its own comment says.
//!
//! With `GNTTAB_MODELS_LOG` naming what a run of all models printed, this writes the list anew, figures
//! included (`.ci/models` does that); without, it holds the list to the sources.

/// The list and the sources.
#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    const BEGIN: &str = "<!-- begin: written by .ci/models -->\n";
    const END: &str = "<!-- end -->\n";

    /// A model as its source has it.
    struct Model {
        name: String,
        proves: String,
        reach: String,
    }

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    /// The files with models, and how their tests are called in the list.
    fn sources() -> Vec<(PathBuf, String)> {
        let models = root().join("crates/engine/src/models");
        let mut files: Vec<_> = fs::read_dir(&models)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                let name = path.file_stem().unwrap().to_string_lossy().into_owned();
                (path, name)
            })
            .collect();
        files.push((root().join("crates/io/tests/loom.rs"), "ring".to_owned()));
        files.sort();
        files
    }

    fn models() -> Vec<Model> {
        sources()
            .into_iter()
            .flat_map(|(path, module)| parse(&fs::read_to_string(path).unwrap(), &module))
            .collect()
    }

    /// Every test of a file: the comment above it, its name, and how far it goes.
    fn parse(source: &str, module: &str) -> Vec<Model> {
        let parts: Vec<&str> = source.split("\n#[test]\nfn ").collect();
        parts
            .windows(2)
            .map(|pair| {
                let lines: Vec<&str> = pair[0]
                    .lines()
                    .rev()
                    .take_while(|line| line.starts_with("///"))
                    .collect();
                let words = |line: &&str| line.trim_start_matches('/').trim().to_owned();
                let proves = lines.iter().rev().map(words).collect::<Vec<_>>().join(" ");
                let (name, body) = pair[1].split_once('(').unwrap();
                Model {
                    name: format!("{module}::{name}"),
                    proves,
                    reach: reach(body),
                }
            })
            .collect()
    }

    fn reach(body: &str) -> String {
        let body = body.split("\n}\n").next().unwrap();
        match body.split_once("up_to_preemptions(") {
            Some((_, rest)) => format!("up to {} preemptions", rest.split(',').next().unwrap()),
            // What calls neither calls a helper of its file that goes through every order.
            None => "every order".to_owned(),
        }
    }

    /// Orders and seconds of each model, by what a run printed.
    fn figures(log: &str) -> BTreeMap<String, (u64, f64)> {
        let mut all = BTreeMap::new();
        for line in log.lines() {
            let Some(at) = line.find("model ") else { continue };
            let words: Vec<&str> = line[at..].split(' ').collect();
            let [_, name, orders, seconds] = words[..] else {
                continue;
            };
            let name = name
                .strip_prefix("models::")
                .map_or_else(|| format!("ring::{name}"), str::to_owned);
            let (Ok(orders), Ok(seconds)) = (orders.parse::<u64>(), seconds.parse::<f64>()) else {
                continue;
            };
            let sum: &mut (u64, f64) = all.entry(name).or_default();
            *sum = (sum.0 + orders, sum.1 + seconds);
        }
        all
    }

    #[test]
    fn the_list_is_that_of_the_sources() {
        let path = root().join("docs/models.md");
        let text = fs::read_to_string(&path).unwrap();
        let (head, rest) = text.split_once(BEGIN).expect("the list has its marks");
        let (list, tail) = rest.split_once(END).expect("the list has its marks");
        let models = models();
        assert!(models.len() > 30, "the sources were found");
        if let Ok(log) = env::var("GNTTAB_MODELS_LOG") {
            let figures = figures(&fs::read_to_string(log).unwrap());
            let mut list = String::from(
                "| model | what it proves | how far | orders | seconds |\n|---|---|---|---|---|\n",
            );
            for Model { name, proves, reach } in &models {
                let (orders, seconds) = figures.get(name).unwrap_or_else(|| panic!("{name} did not run"));
                writeln!(
                    list,
                    "| `{name}` | {proves} | {reach} | {orders} | {seconds:.1} |"
                )
                .unwrap();
            }
            fs::write(&path, format!("{head}{BEGIN}{list}{END}{tail}")).unwrap();
            return;
        }
        let mut rows = list.lines().skip(2);
        for Model { name, proves, reach } in &models {
            assert!(!proves.is_empty(), "{name} does not say what it proves");
            let wanted = format!("| `{name}` | {proves} | {reach} | ");
            let row = rows.next().unwrap_or_default();
            assert!(
                row.starts_with(&wanted),
                "docs/models.md is stale: run .ci/models\n wanted {wanted}\n found  {row}"
            );
        }
        assert_eq!(rows.next(), None, "docs/models.md lists what is not there");
    }
}
