//! `gnttab run`: a machine from a file.

use crate::args::Run;
use crate::failure::Failure;
use crate::machine::{self, Machine};
use crate::output;

/// Runs the machine until it is told to stop or has nothing left to do.
pub(crate) fn main(args: &Run) -> Result<(), Failure> {
    if args.example {
        output::line(machine::EXAMPLE.trim_end());
        return Ok(());
    }
    let Some(path) = &args.machine else {
        return Err(Failure::wrong_use("no machine file given").next("see: gnttab run --help"));
    };
    let machine = Machine::load(path)?;
    if args.check {
        let (domains, disks) = (machine.domains.len(), machine.disks.len());
        if args.json {
            output::json("run", serde_json::json!({ "domains": domains, "disks": disks }));
        } else {
            output::say(&format!(
                "{}: {domains} domains, {disks} disks, no mistakes found",
                path.display()
            ));
        }
        return Ok(());
    }
    Err(Failure::new("run: not there yet"))
}
