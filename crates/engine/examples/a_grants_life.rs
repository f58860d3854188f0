//! The life of a grant, as the hypervisor sees it.
//!
//! `cargo run -p gnttab-engine --example a_grants_life`
//!
//! Two domains in the in-memory machine: G grants C a page, C maps it by a hypercall with arguments
//! in its own memory, writes through the mapping, and dies with it mapped. Printed is every call
//! that the engine makes to the hypervisor meanwhile, and the entry as it lies in shared memory.

use gnttab_abi::{Abi, Command, EncodeError, GrantStatus, MapFlags, MapGrantRef, Op, Truncated};
use gnttab_engine::machine::{C, G, Request, Scene, Traced};
use gnttab_engine::{Call, EntryWords, Fault, GuestMemory, Outcome, Retired};

/// Where C keeps its hypercall's argument.
const ARGUMENT: u64 = 0x10_0000;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("the argument does not fit its layout: {0}")]
    Encode(#[from] EncodeError),
    #[error("the argument is cut short: {0}")]
    Decode(#[from] Truncated),
    #[error("there is no memory for C's argument")]
    NoMemory,
    #[error("the hypercall ended with {0:?}")]
    Hypercall(Outcome),
    #[error("the map ended with status {0}")]
    Map(GrantStatus),
}

fn main() -> Result<(), Error> {
    let scene = Scene::pv().build_on(|machine| Traced::tracing(machine, 1000));
    let trace = scene.engine.hypervisor().watch();
    let show = |what: &str| {
        println!("\n{what}");
        for event in trace.take() {
            // Hooks are where tests stop the engine; it asks nothing there.
            if !matches!(event.request, Request::Hook(_)) {
                println!("    {event}");
            }
        }
        match scene.entry(G, Scene::GREF) {
            EntryWords::V1(entry) => println!("    entry {}: {entry}", Scene::GREF),
            EntryWords::V2(entry, status) => println!("    entry {}: {entry}, {status}", Scene::GREF),
        }
    };
    let caller = scene.domain(C);
    caller.private().add_memory(ARGUMENT, 1).ok_or(Error::NoMemory)?;
    show("The scene is set: G has granted C a page.");

    let place = scene.place(0);
    let item = MapGrantRef {
        host_addr: place,
        flags: MapFlags::HOST_MAP,
        gref: Scene::GREF,
        dom: G,
        ..MapGrantRef::default()
    };
    let mut bytes = [0; MapGrantRef::size(Abi::X86_64)];
    item.encode(Abi::X86_64, &mut bytes)?;
    caller.private().write(ARGUMENT, &bytes)?;
    let call = Call {
        command: Command::new(Op::MapGrantRef),
        addr: ARGUMENT,
        count: 1,
    };
    let vcpu = scene.vcpu(C, 0);
    let outcome = scene
        .processor()
        .hypercall(&vcpu, Abi::X86_64, call, caller.private(), &mut || false);
    if outcome != Outcome::Done(Ok(())) {
        return Err(Error::Hypercall(outcome));
    }
    caller.private().read(ARGUMENT, &mut bytes)?;
    let done = MapGrantRef::decode(Abi::X86_64, &bytes)?;
    done.status.result().map_err(Error::Map)?;
    show("C has mapped it.");

    caller
        .private()
        .write(place, b"written by C through the mapping")?;
    let page = scene.machine.page(scene.frame.mfn);
    let bytes = page.and_then(|page| page.read_bytes::<32>(0)).unwrap_or_default();
    println!("\nG's page holds: {}", String::from_utf8_lossy(&bytes));

    drop((vcpu, caller));
    let retired = scene.kill(C);
    show("C has died.");
    let wrong = scene.audit();
    for violation in &wrong {
        println!("{violation}");
    }
    assert_eq!(retired, Retired::Gone);
    assert!(wrong.is_empty(), "the books are right");
    println!("\nAll books are right.");
    Ok(())
}
