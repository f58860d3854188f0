//! The operations that are not in the path of data.

use crate::sampler::Sampler;

pub(crate) fn run(_sampler: &mut Sampler<'_>) {}
