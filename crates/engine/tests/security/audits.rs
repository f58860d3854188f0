//! The audits of the raw door and of a call's cost see what they are for. The others are shown in
//! `machine_scenes.rs` and in `src/machine/books.rs`.

use gnttab_abi::{Abi, Command, MapFlags, Op};
use gnttab_engine::machine::{Audit, Between, Budget, C, Effort, Fenced, Scene};
use gnttab_engine::{Call, GuestMemory};

const AT: u64 = 0x5000_0000;

fn kinds(found: &[gnttab_engine::machine::Violation]) -> Vec<Audit> {
    found.iter().map(|violation| violation.audit).collect()
}

#[test]
fn a_write_beside_the_out_fields_and_a_second_read_are_seen() {
    let scene = Scene::pv().build();
    let domain = scene.domain(C);
    domain.private().add_memory(AT, 1).unwrap();
    let call = Call {
        command: Command(Op::UnmapGrantRef.number()),
        addr: AT,
        count: 2,
    };
    let fenced = || Fenced::around(domain.private(), Abi::X86_64, call);
    let memory = fenced();
    memory.read(AT, &mut [0; 24]).unwrap();
    memory.read(AT + 24, &mut [0; 24]).unwrap();
    memory.write(AT + 20, &[1, 1]).unwrap();
    memory.write(AT + 44, &[1, 1]).unwrap();
    // What is written back as it was changes nothing.
    memory.write(AT, &[0; 20]).unwrap();
    assert_eq!(memory.audit(), []);
    memory.read(AT + 23, &mut [0; 1]).unwrap();
    assert_eq!(kinds(&memory.audit()), [Audit::Buffers], "read twice");
    let memory = fenced();
    memory.write(AT + 22, &[1]).unwrap();
    memory.write(AT + 48, &[1]).unwrap();
    assert_eq!(
        kinds(&memory.audit()),
        [Audit::Buffers; 2],
        "past the status, past the array"
    );
}

#[test]
#[should_panic(expected = "AUD-WRK")]
fn a_call_that_never_stops_reading_is_cut_short() {
    let scene = Scene::pv().build();
    let domain = scene.domain(C);
    domain.private().add_memory(AT, 1).unwrap();
    let memory = Fenced::allowing(domain.private(), vec![], 1000);
    while memory.read(AT, &mut [0]).is_ok() {}
}

#[test]
fn steps_and_stack_beyond_the_budget_are_seen() {
    let scene = Scene::pv().build_on(|machine| Between::new(machine, Effort::default()));
    let effort = scene.engine.hypervisor().watch();
    let map = || scene.map(scene.place(0), MapFlags::HOST_MAP);
    effort.call(
        Budget {
            steps: 3,
            stack: 1 << 20,
        },
        map,
    );
    assert_eq!(kinds(&effort.audit()), [Audit::Work]);
    effort.call(
        Budget {
            steps: 1000,
            stack: 8,
        },
        map,
    );
    assert_eq!(kinds(&effort.audit()), [Audit::Work; 2]);
    assert!(effort.depth() > 8 && effort.depth() < Budget::items(1).stack);
    effort.call(Budget::items(1), map);
    assert_eq!(effort.audit().len(), 2);
}
