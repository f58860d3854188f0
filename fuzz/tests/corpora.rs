//! The corpora, replayed without a fuzzer: what once was interesting, or a finding, still holds.

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn every_corpus_is_there_and_holds() {
        for (name, target) in gnttab_fuzz::TARGETS {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
            let files =
                std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
            let mut played = 0;
            for file in files {
                let path = file.expect("a folder that can be read").path();
                let input = std::fs::read(&path).expect("a file that can be read");
                // Told by the harness only when it fails.
                println!("{}", path.display());
                target(&input);
                played += 1;
            }
            assert!(played > 0, "{}: no input", folder.display());
        }
    }
}
