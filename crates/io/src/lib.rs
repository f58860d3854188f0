//! Shared rings and the split-driver protocols on them: blkif, frontend and backend.
