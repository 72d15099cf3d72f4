//! The standard library's locks, under a name of our own: `tests/loom` puts
//! loom's in their place and tries every order in which threads may meet.

pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
