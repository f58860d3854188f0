//! A PV kernel that a real Xen boots as its first domain, to ask it what scripts want to know.
//!
//! It knows nothing about what is right: it plays scripts (`gnttab_conformance::play`) that come
//! in through pages which the runner sees too, and puts the answers there. `xen` is what it needs
//! of Xen, `world` what scripts are played on.

#![no_std]
#![no_main]

mod bare;
mod domain;
mod mailbox;
mod world;
mod xen;

use core::fmt::Write;

use gnttab_conformance::mailbox::GREETING;
use gnttab_conformance::play::play;

/// Where the kernel starts, on its own stack.
extern "C" fn start(info: u64) -> ! {
    xen::start(info);
    let mut world = world::RealXen::new();
    let mut mailbox = mailbox::Mailbox::new();
    let _ = writeln!(xen::Console, "{GREETING}{:x}", mailbox.frame());
    loop {
        mailbox.wait();
        let mut clean = true;
        while let Some(script) = mailbox.next_script() {
            world.answer.clear();
            world.verbose = script.first() == Some(&1);
            clean = play(&mut world, script.get(1..).unwrap_or(&[]));
            if !mailbox.answer(&world.answer) || !clean {
                break;
            }
        }
        mailbox.finish(clean);
    }
}
