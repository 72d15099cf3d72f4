//! Owner of a lease: a process, told apart from all others, and whether it
//! lives as far as this machine can tell.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// Leases that this process holds, by their ids: one process may run several
/// jobs, and its number alone does not tell them apart.
static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeaseOwner {
    pub(super) host: String,
    pub(super) pid: u32,
    /// Boot of the machine and namespace of its process numbers, within which a
    /// number means one process at a time. Empty if the system does not tell.
    machine: String,
    /// Start of the process in the machine's clock ticks, since numbers are used
    /// again.
    started: Option<u64>,
    /// Random id of the lease.
    id: String,
}

impl fmt::Display for LeaseOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} on {}", self.pid, self.host)
    }
}

impl LeaseOwner {
    /// Makes this process the owner of a new lease.
    pub(super) fn new() -> Self {
        let pid = std::process::id();
        // Each `RandomState` has another seed.
        let random = || RandomState::new().hash_one(pid);
        Self {
            host: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            pid,
            machine: machine(),
            started: started(pid),
            id: format!("{:016x}{:016x}", random(), random()),
        }
    }

    /// Makes the owner of a lease that cannot be read.
    pub(super) fn unknown() -> Self {
        Self {
            host: "an unknown host".to_owned(),
            pid: 0,
            machine: String::new(),
            started: None,
            id: String::new(),
        }
    }

    /// Returns whether the owner lives; `None` if it ran on another machine or
    /// in another container, or if the system does not tell.
    pub(super) fn is_alive(&self) -> Option<bool> {
        if self.machine.is_empty() || self.machine != machine() {
            return None;
        }
        if self.pid == std::process::id() && self.started == started(self.pid) {
            let live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
            return Some(live.contains(&self.id));
        }
        let then = self.started?;
        Some(started(self.pid) == Some(then))
    }
}

/// Guard that counts a lease among those of this process.
#[derive(Debug)]
pub(super) struct LiveLease(String);

impl LiveLease {
    pub(super) fn new(owner: &LeaseOwner) -> Self {
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        live.insert(owner.id.clone());
        Self(owner.id.clone())
    }
}

impl Drop for LiveLease {
    fn drop(&mut self) {
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        live.remove(&self.0);
    }
}

/// Returns the boot and the namespace of process numbers; empty if unknown.
fn machine() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = std::fs::read_link("/proc/self/ns/pid");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) => format!("{} {}", boot.trim(), namespace.display()),
        _ => String::new(),
    }
}

/// Returns the start of a process in clock ticks; `None` if there is no such
/// process, or only the remains of one.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have spaces and parentheses in it. The state
    // follows, and 19 fields after it the start.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let is_gone = matches!(fields.next()?, "Z" | "X");
    let started = fields.nth(18)?.parse().ok()?;
    (!is_gone).then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_known_to_live_while_it_holds_its_lease() {
        let owner = LeaseOwner::new();
        assert_eq!(owner.is_alive(), Some(false));
        let live = LiveLease::new(&owner);
        assert_eq!(owner.is_alive(), Some(true));
        // Another lease of the same process is not this one.
        assert_eq!(LeaseOwner::new().is_alive(), Some(false));
        drop(live);
        assert_eq!(owner.is_alive(), Some(false));
    }

    #[test]
    fn a_process_that_has_ended_is_known_to_be_gone() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("a process");
        let mut owner = LeaseOwner::new();
        owner.pid = child.id();
        owner.started = started(child.id());
        assert_eq!(owner.is_alive(), Some(true));
        child.kill().expect("killed");
        // Until its parent has asked, its remains have a number.
        while owner.is_alive() == Some(true) {
            std::thread::yield_now();
        }
        assert_eq!(owner.is_alive(), Some(false));
        child.wait().expect("an end");
        assert_eq!(owner.is_alive(), Some(false));
        // A number that was given to another process.
        owner.pid = std::process::id();
        assert_eq!(owner.is_alive(), Some(false));
    }

    #[test]
    fn another_machine_cannot_be_told() {
        let elsewhere = LeaseOwner {
            machine: "another boot".to_owned(),
            ..LeaseOwner::new()
        };
        assert_eq!(elsewhere.is_alive(), None);
        assert_eq!(LeaseOwner::unknown().is_alive(), None);
    }
}
