//! How a command fails: one line that names what failed, on which object, why, and the next step.

use std::fmt;

/// Why a command did not do what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    exit_code: u8,
    what: String,
    next: Option<String>,
    /// Standard output has it already.
    in_data: bool,
}

impl Failure {
    /// What failed, on which object, and why. Exit code 1.
    pub(crate) fn new(what: impl fmt::Display) -> Self {
        Failure {
            exit_code: 1,
            what: what.to_string(),
            next: None,
            in_data: false,
        }
    }

    /// What was asked can never be, whatever the state of the system. Exit code 2.
    pub(crate) fn wrong_use(what: impl fmt::Display) -> Self {
        Failure {
            exit_code: 2,
            what: what.to_string(),
            next: None,
            in_data: false,
        }
    }

    /// Adds what to do about it.
    pub(crate) fn next(mut self, next: impl fmt::Display) -> Self {
        self.next = Some(next.to_string());
        self
    }

    /// What was printed as data says so already.
    pub(crate) fn in_data(mut self) -> Self {
        self.in_data = true;
        self
    }

    /// Whether what was printed as data says so already.
    pub(crate) fn is_in_data(&self) -> bool {
        self.in_data
    }

    /// 1 failed, 2 wrong use.
    pub(crate) fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// The same as data.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "what": self.what, "next": self.next, "exit_code": self.exit_code })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.next {
            Some(next) => write!(f, "; {next}"),
            None => Ok(()),
        }
    }
}
