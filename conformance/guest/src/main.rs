//! A PV kernel that a real Xen boots as its first domain, to ask it what scripts want to know.
//!
//! It knows nothing about what is right: it plays scripts (`gnttab_conformance::play`) that come
//! in through pages which the runner sees too, and puts the answers there. `xen` is what it needs
//! of Xen, `world` what scripts are played on.

#![no_std]
#![no_main]

mod bare;
mod mailbox;
mod other;
mod world;
mod xen;

use core::fmt::Write;

use gnttab_conformance::mailbox::{GREETING, HYPERCALLS, MEET, Meeting, PEEK};
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
        match mailbox.kind() {
            HYPERCALLS => {
                while let Some([number, a, b, c, d, e]) = mailbox.next_words() {
                    let result = match number {
                        PEEK => xen::load64(a),
                        _ => xen::hypercall5(number, [a, b, c, d, e]) as u64,
                    };
                    mailbox.answer_word(result);
                }
                mailbox.finish(true);
                continue;
            }
            MEET => {
                if let Some(words) = mailbox.next_words::<{ Meeting::WORDS }>() {
                    world.meet(&Meeting::from_words(&words));
                }
                mailbox.finish(true);
                continue;
            }
            _ => {}
        }
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
