//! Locks of the standard library, under a module of our own: `tests/loom`
//! replaces them with loom's and tries every order in which threads may meet.

pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
