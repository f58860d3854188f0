//! The control socket: its lines as they are read on both sides, and a machine that answers on one.
//!
//! What must hold: no line panics, either way; what was understood is said again in the same words; a
//! machine answers each question, and each line that is none, with one line that its own client can
//! read, until the caller hangs up; and it goes on answering the next caller.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use gnttab_host::control::{Answer, Control, Question, decode_answer, decode_question, encode};
use gnttab_host::monitor::{Monitor, Settings};

/// Bytes of a question; a longer one ends the conversation.
const QUESTION: usize = 4096;

/// Plays an input: what a caller sends.
///
/// # Panics
/// When a rule of the module's head is broken.
pub fn run(input: &[u8]) {
    // As whole lines, and as what a machine may send.
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        if let Ok(question) = decode_question(line) {
            assert_eq!(decode_question(&encode(&question)), Ok(question));
        }
        if let Ok(answer) = decode_answer(line) {
            assert_eq!(decode_answer(&encode(&answer)), Ok(answer));
        }
    }
    // Mostly right: each byte is a piece of a question.
    let pieced: Vec<u8> = input
        .iter()
        .flat_map(|byte| PIECES[usize::from(*byte) % PIECES.len()].bytes())
        .collect();
    converse(input);
    converse(&pieced);
}

const PIECES: [&str; 24] = [
    "{\"version\":1,\"content\":",
    "{\"get\":\"machine\"}}\n",
    "{\"get\":\"domains\"}}\n",
    "{\"get\":\"table\",\"domain\":",
    "0}}\n",
    "1}}\n",
    "65535}}\n",
    "65536}}\n",
    "{\"version\":2,",
    "\"content\":17}\n",
    "\n",
    "{",
    "}",
    "[[[[",
    "]",
    "null",
    "\"get\"",
    ":",
    ",",
    "-1e999",
    "\"\\u0000\"",
    "\u{e9}",
    "true",
    " ",
];

/// What a caller who sends that is told.
fn converse(sent: &[u8]) {
    let mut expected = 0;
    for line in sent.split_inclusive(|byte| *byte == b'\n') {
        // Who asks for events is told them for as long as it listens: not here.
        if matches!(decode_question(line), Ok(Question::Events(_))) {
            return;
        }
        expected += 1;
        if line.len() > QUESTION || !line.ends_with(b"\n") {
            break;
        }
    }
    let machine = machine();
    let mut stream = UnixStream::connect(&machine.path).expect("somebody answers");
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    // The other side may have had enough before the end.
    let _ = stream.write_all(sent);
    let _ = stream.shutdown(Shutdown::Write);
    let mut told = Vec::new();
    let end = stream.read_to_end(&mut told);
    let lines: Vec<_> = told.split_inclusive(|byte| *byte == b'\n').collect();
    for line in &lines {
        assert!(line.ends_with(b"\n"), "an answer is a line");
        let answer = decode_answer(line).expect("an answer that a client can read");
        assert!(!matches!(answer, Answer::Event(_) | Answer::Watching));
    }
    // Hanging up on somebody who still sends loses what was said last.
    if sent.len() <= QUESTION {
        end.expect("the conversation ends");
        assert_eq!(lines.len(), expected, "one answer each");
    }
}

struct Machine {
    path: PathBuf,
    _control: Control,
}

/// One machine, without domains, for all inputs.
fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let monitor = Arc::new(Monitor::start(Settings::default()).expect("a monitor"));
        let path = std::env::temp_dir().join(format!("gnttab-fuzz-{}.control", std::process::id()));
        let control = Control::open(&path, monitor).expect("a control socket");
        Machine {
            path,
            _control: control,
        }
    })
}
