//! Whether the worker serves: the engine is ready and nobody asked it to end.

use std::sync::Arc;

use tokio::sync::watch;

use crate::engine::{Facts, Failure, State};

/// A view of the worker's state that any part may hold.
#[derive(Debug, Clone)]
pub struct Readiness {
    engine: watch::Receiver<State>,
    draining: watch::Receiver<bool>,
}

/// Why the worker does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unready {
    /// The engine loads and warms up.
    Loading,
    /// The worker was asked to end.
    Draining,
    /// The engine has ended before its time.
    Failed,
}

impl std::fmt::Display for Unready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Loading => "loading",
            Self::Draining => "draining",
            Self::Failed => "failed",
        })
    }
}

/// The end that says that the worker drains.
#[derive(Debug, Clone)]
pub struct Drain(Arc<watch::Sender<bool>>);

impl Drain {
    /// From now on nothing is ready. Cannot be undone.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }
}

impl Readiness {
    /// Readiness of the engine with this state, and the means to end it.
    #[must_use]
    pub fn new(engine: watch::Receiver<State>) -> (Self, Drain) {
        let (drain, draining) = watch::channel(false);
        (Self { engine, draining }, Drain(Arc::new(drain)))
    }

    /// What the engine told of itself.
    ///
    /// # Errors
    ///
    /// Why the worker does not serve.
    pub fn get(&self) -> Result<Facts, Unready> {
        if *self.draining.borrow() {
            return Err(Unready::Draining);
        }
        match &*self.engine.borrow() {
            State::Ready(facts) => Ok(facts.clone()),
            State::Loading => Err(Unready::Loading),
            State::Stopped => Err(Unready::Draining),
            State::Failed(_) => Err(Unready::Failed),
        }
    }

    /// Why the engine has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        match &*self.engine.borrow() {
            State::Failed(failure) => Some(failure.clone()),
            _ => None,
        }
    }

    /// Waits until readiness may have changed. Pends for ever once nothing
    /// can change any more.
    pub async fn changed(&mut self) {
        let (engine, draining) = (&mut self.engine, &mut self.draining);
        let engine = async {
            if engine.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let draining = async {
            if draining.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = engine => {}
            () = draining => {}
        }
    }
}
