//! imagegpt-worker.

pub mod attention;
