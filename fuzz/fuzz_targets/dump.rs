//! See [`gnttab_fuzz::dump`].
#![cfg_attr(fuzzing, no_main)]
gnttab_fuzz::target!(gnttab_fuzz::dump::run);
