//! Random scenes and sequences of steps, for proptest.

use gnttab_engine::DomainKind;
use proptest::prelude::*;

use super::spec::Limits;
use super::step::{Step, What};

fn plain() -> impl Strategy<Value = What> {
    use What::*;
    prop_oneof![
        18 => Just(Entry),
        9 => Just(Twist),
        20 => Just(Map),
        1 => Just(Flood),
        14 => Just(Unmap),
        4 => Just(Replace),
        18 => Just(Copy),
        3 => Just(Swap),
        4 => Just(Version),
        2 => Just(Setup),
        1 => Just(StatusFrames),
        1 => Just(Query),
        1 => Just(Door),
        3 => Just(Transfer),
        3 => Just(Place),
        4 => Just(Touch),
        3 => Just(OwnMap),
        3 => Just(Page),
        1 => Just(Kill),
        2 => Just(Create),
    ]
}

pub(crate) fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let plain_step = || {
        (plain(), any::<[u8; 12]>()).prop_map(|(what, choices)| Step {
            what,
            choices: choices.to_vec(),
            inner: Vec::new(),
        })
    };
    let around = prop_oneof![Just(What::UnmapAround), Just(What::CopyAround)];
    let around = (
        around,
        any::<[u8; 12]>(),
        proptest::collection::vec(plain_step(), 1..4),
    )
        .prop_map(|(what, choices, inner)| Step {
            what,
            choices: choices.to_vec(),
            inner,
        });
    let step = prop_oneof![5 => plain_step(), 1 => around];
    proptest::collection::vec(step, 1..most)
}

/// The domains of a scene: x86 of both kinds, or Arm.
pub(crate) fn scene() -> impl Strategy<Value = Vec<Limits>> {
    let x86 = || prop_oneof![3 => Just(DomainKind::Pv), 2 => Just(DomainKind::Hvm)];
    let kinds = prop_oneof![5 => [x86(), x86(), x86()], 1 => Just([DomainKind::Arm; 3])];
    let version = || prop_oneof![5 => Just(2u32), 1 => Just(1)];
    let handles = || prop_oneof![1 => Just(0u32), 6 => Just(1), 3 => Just(2)];
    let rest = || (version(), 1u32..12, handles(), any::<bool>(), 0u32..3);
    (kinds, [rest(), rest(), rest()]).prop_map(|(kinds, rest)| {
        let pairs = kinds.into_iter().zip(rest);
        let limits = pairs.map(
            |(kind, (max_version, max_frames, maptrack_frames, iommu, first))| Limits {
                kind,
                max_version,
                version: if first == 0 { 1 } else { max_version },
                max_frames,
                maptrack_frames,
                iommu: iommu && kind == DomainKind::Pv,
            },
        );
        limits.collect()
    })
}
