//! Whether the worker is ready and whether it serves, which differ for a while
//! at its end: a load balancer needs time to see that a worker is not ready any
//! more, and what it sends in that time is still served.

use std::sync::Arc;

use tokio::sync::watch;

use crate::engine::EngineFacts;
use crate::serve::devices::{DeviceState, DeviceStates, WorkerFailure, WorkerState};

/// A view of the worker's state that any part may hold.
#[derive(Debug, Clone)]
pub struct Readiness {
    devices: watch::Receiver<DeviceStates>,
    phase: watch::Receiver<Phase>,
}

/// How far the worker's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nobody asked it to end.
    Staying,
    /// Not ready, so that nobody new comes; whoever comes is served.
    Leaving,
    /// No new work is taken.
    Draining,
}

/// Why the worker is not ready, or does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unready {
    /// The engines load and warm up.
    Loading,
    /// The worker was asked to end, and still serves whoever has not noticed.
    Leaving,
    /// The worker was asked to end and takes no new work.
    Draining,
    /// The last engine, or a stage, has ended before its time.
    Failed,
}

impl std::fmt::Display for Unready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Loading => "loading",
            Self::Leaving => "leaving",
            Self::Draining => "draining",
            Self::Failed => "failed",
        })
    }
}

/// The end that says that the worker ends. Nothing of it can be undone.
#[derive(Debug, Clone)]
pub struct Drain(Arc<watch::Sender<Phase>>);

impl Drain {
    /// From now on the worker is not ready, but serves.
    pub fn leave(&self) {
        self.0.send_if_modified(|phase| {
            let staying = *phase == Phase::Staying;
            if staying {
                *phase = Phase::Leaving;
            }
            staying
        });
    }

    /// From now on no new work is taken.
    pub fn begin(&self) {
        self.0.send_replace(Phase::Draining);
    }
}

impl Readiness {
    /// Readiness of a worker with these devices, and the means to end it.
    #[must_use]
    pub fn new(devices: watch::Receiver<DeviceStates>) -> (Self, Drain) {
        let (drain, phase) = watch::channel(Phase::Staying);
        (Self { devices, phase }, Drain(Arc::new(drain)))
    }

    /// Whether the worker is ready, as probes and load balancers ask, with what
    /// the engine told of itself.
    ///
    /// # Errors
    ///
    /// Why it is not.
    pub fn get(&self) -> Result<EngineFacts, Unready> {
        match *self.phase.borrow() {
            Phase::Leaving => Err(Unready::Leaving),
            Phase::Staying | Phase::Draining => self.serving(),
        }
    }

    /// Whether the worker takes work, as handlers ask; one that is leaving
    /// still does.
    ///
    /// # Errors
    ///
    /// Why it does not.
    pub fn serving(&self) -> Result<EngineFacts, Unready> {
        if *self.phase.borrow() == Phase::Draining {
            return Err(Unready::Draining);
        }
        match self.devices.borrow().state() {
            WorkerState::Ready(facts) => Ok(facts),
            WorkerState::Loading => Err(Unready::Loading),
            WorkerState::Stopped => Err(Unready::Draining),
            WorkerState::Failed(_) => Err(Unready::Failed),
        }
    }

    /// Why the worker can do no more, if so.
    #[must_use]
    pub fn failure(&self) -> Option<WorkerFailure> {
        self.devices.borrow().failure().cloned()
    }

    /// The devices one by one.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceState> {
        self.devices.borrow().each().to_vec()
    }

    /// Waits until no new work is taken because the worker ends; for ever if
    /// that can no longer be.
    pub async fn drained(&mut self) {
        let draining = |phase: &Phase| *phase == Phase::Draining;
        if self.phase.wait_for(draining).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until readiness may have changed. Pends for ever once nothing
    /// can change any more.
    pub async fn changed(&mut self) {
        let (devices, phase) = (&mut self.devices, &mut self.phase);
        let devices = async {
            if devices.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let phase = async {
            if phase.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = devices => {}
            () = phase => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::devices::DeviceIdx;

    fn facts() -> EngineFacts {
        EngineFacts {
            provider: "fake",
            runtime_version: String::new(),
            dimension: 4,
            n_classes: 3,
            sequences: None,
            fallbacks: Vec::new(),
        }
    }

    #[test]
    fn a_worker_that_leaves_serves_on_until_it_drains() {
        let (engine, devices) = watch::channel(DeviceStates::loading([0]));
        let (readiness, drain) = Readiness::new(devices);
        assert_eq!(readiness.get().err(), Some(Unready::Loading));
        engine.send_modify(|devices| devices.loaded(DeviceIdx(0), &facts()));
        assert!(readiness.get().is_ok() && readiness.serving().is_ok());
        drain.leave();
        assert_eq!(readiness.get().err(), Some(Unready::Leaving));
        assert!(readiness.serving().is_ok());
        drain.begin();
        drain.leave();
        assert_eq!(readiness.get().err(), Some(Unready::Draining));
        assert_eq!(readiness.serving().err(), Some(Unready::Draining));
    }

    #[tokio::test]
    async fn drained_waits_for_the_drain_alone() {
        let (_engine, devices) = watch::channel(DeviceStates::loading([0]));
        let (mut readiness, drain) = Readiness::new(devices);
        drain.leave();
        tokio::select! {
            biased;
            () = readiness.drained() => panic!("it only leaves"),
            () = std::future::ready(()) => {}
        }
        drain.begin();
        readiness.drained().await;
    }
}
