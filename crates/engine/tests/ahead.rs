//! ENG-5: what the engine sees of a batch ahead of its items' turns decides nothing.

#![cfg(feature = "machine")]

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use gnttab_abi::{Abi, Command, Copy, CopyFlags, CopyPtr, DomId, GrantStatus, MapFlags, MapGrantRef, Op};
    use gnttab_engine::machine::{C, G, Scene};
    use gnttab_engine::{Call, Fault, GuestMemory, Outcome, Version};

    /// Items of a batch: several groups that are looked at together, and a part of one.
    const ITEMS: u32 = 21;

    /// Arguments that are one thing to who looks ahead, and another to who reads.
    struct TwoFaced {
        real: RefCell<Vec<u8>>,
        seen: u8,
        looks: RefCell<u32>,
    }

    impl GuestMemory for TwoFaced {
        fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
            let at = usize::try_from(addr).unwrap();
            into.copy_from_slice(&self.real.borrow()[at..at + into.len()]);
            Ok(())
        }

        fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Fault> {
            let at = usize::try_from(addr).unwrap();
            self.real.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn peek(&self, _: u64, into: &mut [u8]) -> bool {
            *self.looks.borrow_mut() += 1;
            into.fill(self.seen);
            true
        }
    }

    fn call(scene: &Scene, op: Op, bytes: Vec<u8>, seen: u8) -> Vec<u8> {
        let memory = TwoFaced {
            real: RefCell::new(bytes),
            seen,
            looks: RefCell::new(0),
        };
        let call = Call {
            command: Command::new(op),
            addr: 0,
            count: ITEMS,
        };
        let vcpu = scene.vcpu(C, 0);
        let outcome = scene
            .processor()
            .hypercall(&vcpu, Abi::X86_64, call, &memory, &mut || false);
        assert_eq!(outcome, Outcome::Done(Ok(())));
        assert!(*memory.looks.borrow() > 0, "the engine never looked ahead");
        memory.real.into_inner()
    }

    fn scenes() -> impl Iterator<Item = (Scene, u8)> {
        let lies = [0, 1, 0x7F, 0x80, 0xFF];
        lies.into_iter().flat_map(|seen| {
            [
                (Scene::pv().build(), seen),
                (Scene::pv().version(G, Version::V2).build(), seen),
                (Scene::hvm().build(), seen),
            ]
        })
    }

    /// Each map is done as it is read, whatever its argument looked like before.
    #[test]
    fn maps_are_judged_by_what_is_read() {
        for (scene, seen) in scenes() {
            let mut bytes = vec![0; ITEMS as usize * 32];
            for (n, raw) in (0..).zip(bytes.chunks_exact_mut(32)) {
                let item = MapGrantRef {
                    host_addr: scene.place(n),
                    flags: MapFlags::HOST_MAP | MapFlags::READONLY,
                    gref: Scene::GREF,
                    // One is another domain's, which does not exist.
                    dom: if n == 13 { DomId(77) } else { G },
                    ..MapGrantRef::default()
                };
                item.encode(Abi::X86_64, raw).unwrap();
            }
            let answers = call(&scene, Op::MapGrantRef, bytes, seen);
            for (n, raw) in answers.chunks_exact(32).enumerate() {
                let status = MapGrantRef::decode(Abi::X86_64, raw).unwrap().status;
                let right = if n == 13 {
                    GrantStatus::BAD_DOMAIN
                } else {
                    GrantStatus::OKAY
                };
                assert_eq!(status, right, "item {n}, seen as {seen:#x}");
            }
            assert_eq!(scene.domain(C).mappings().count(), ITEMS as usize - 1);
            assert_eq!(scene.audit(), []);
        }
    }

    /// The same of copies.
    #[test]
    fn copies_are_judged_by_what_is_read() {
        for (scene, seen) in scenes() {
            let local = scene.local[0];
            let mut bytes = vec![0; ITEMS as usize * 40];
            for (n, raw) in (0..).zip(bytes.chunks_exact_mut(40)) {
                let item = Copy {
                    source: CopyPtr::grant(G, Scene::GREF, 0),
                    dest: CopyPtr::frame(local.gfn.0, 8 * n),
                    len: if n == 13 { 4097 } else { 8 },
                    flags: CopyFlags::SOURCE_GREF,
                    ..Copy::default()
                };
                item.encode(Abi::X86_64, raw).unwrap();
            }
            let answers = call(&scene, Op::Copy, bytes, seen);
            for (n, raw) in answers.chunks_exact(40).enumerate() {
                let status = Copy::decode(Abi::X86_64, raw).unwrap().status;
                let right = if n == 13 {
                    GrantStatus::BAD_COPY_ARG
                } else {
                    GrantStatus::OKAY
                };
                assert_eq!(status, right, "item {n}, seen as {seen:#x}");
            }
            assert_eq!(scene.machine.audit_idle(), []);
        }
    }
}
