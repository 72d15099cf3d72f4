//! Readiness of the worker, and whether the worker serves. The two differ
//! during graceful shutdown: a load balancer needs time to notice that a worker
//! is no longer ready, and calls that arrive in that time are still served.

use std::sync::Arc;

use tokio::sync::watch;

use crate::engine::EngineFacts;
use crate::serve::devices::{DeviceState, DeviceStates, WorkerFailure, WorkerState};

/// View of the worker's state that any part may hold.
#[derive(Debug, Clone)]
pub struct Readiness {
    devices: watch::Receiver<DeviceStates>,
    phase: watch::Receiver<Phase>,
}

/// Phase of the worker's graceful shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No shutdown was requested.
    Staying,
    /// The worker is not ready, so that no new callers are sent to it; calls
    /// that still arrive are served.
    Leaving,
    /// The worker takes no new work.
    Draining,
}

/// Reason why the worker is not ready or does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unready {
    /// The engines load and warm up.
    Loading,
    /// The worker was asked to end, and still serves callers that have not
    /// noticed.
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

/// Handle that begins the worker's graceful shutdown. No step can be undone.
#[derive(Debug, Clone)]
pub struct Drain(Arc<watch::Sender<Phase>>);

impl Drain {
    /// Makes the worker not ready; calls are still served.
    pub fn leave(&self) {
        self.0.send_if_modified(|phase| {
            let staying = *phase == Phase::Staying;
            if staying {
                *phase = Phase::Leaving;
            }
            staying
        });
    }

    /// Makes the worker refuse new work.
    pub fn begin(&self) {
        self.0.send_replace(Phase::Draining);
    }
}

impl Readiness {
    /// Returns the readiness of a worker with these devices, and the handle
    /// that ends the worker.
    #[must_use]
    pub fn new(devices: watch::Receiver<DeviceStates>) -> (Self, Drain) {
        let (drain, phase) = watch::channel(Phase::Staying);
        (Self { devices, phase }, Drain(Arc::new(drain)))
    }

    /// Returns the engine's facts if the worker is ready, for probes and load
    /// balancers.
    ///
    /// # Errors
    ///
    /// Returns the reason why the worker is not ready.
    pub fn get(&self) -> Result<EngineFacts, Unready> {
        match *self.phase.borrow() {
            Phase::Leaving => Err(Unready::Leaving),
            Phase::Staying | Phase::Draining => self.serving(),
        }
    }

    /// Returns the engine's facts if the worker takes work, for handlers; a
    /// worker that is leaving still does.
    ///
    /// # Errors
    ///
    /// Returns the reason why the worker takes no work.
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

    /// Returns the failure that ends the worker, if there is one.
    #[must_use]
    pub fn failure(&self) -> Option<WorkerFailure> {
        self.devices.borrow().failure().cloned()
    }

    /// Returns the state of each device.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceState> {
        self.devices.borrow().each().to_vec()
    }

    /// Waits until the worker drains, that is, takes no new work because it
    /// ends; for ever if that cannot happen any more.
    pub async fn drained(&mut self) {
        let draining = |phase: &Phase| *phase == Phase::Draining;
        if self.phase.wait_for(draining).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until readiness may have changed; for ever once nothing can change
    /// any more.
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
            sizes_untried: false,
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
