//! Faults of a host: calls that fail, fail after having been carried out, or hang.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use mainstay_provider::{ErrorKind, SiteError};
use tokio::sync::Semaphore;

use crate::{trace, turns};

/// What happens to a call.
#[derive(Clone, Debug)]
pub enum HostFault {
    /// It fails and nothing was done.
    Fail(ErrorKind),
    /// It fails after having been carried out.
    FailAfter(ErrorKind),
    /// It hangs until a permit is added, and then goes on.
    Hang(Arc<Semaphore>),
    /// It is carried out, and never answered.
    HangAfter,
}

pub(super) struct FaultPlan {
    planned: Mutex<HashMap<&'static str, VecDeque<HostFault>>>,
    /// A permit for each call that has begun to hang.
    hung: Semaphore,
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self { planned: Mutex::default(), hung: Semaphore::new(0) }
    }
}

impl FaultPlan {
    pub(super) fn add(&self, method: &'static str, fault: HostFault, times: usize) {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        planned.entry(method).or_default().extend(std::iter::repeat_n(fault, times));
    }

    pub(super) fn clear(&self) {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How many calls are still to meet one.
    pub(super) fn left(&self, method: &str) -> usize {
        let planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        planned.get(method).map_or(0, VecDeque::len)
    }

    /// Waits until a call hangs.
    pub(super) async fn wait_for_hang(&self) {
        if let Ok(permit) = self.hung.acquire().await {
            permit.forget();
        }
    }

    fn take(&self, method: &'static str) -> Option<HostFault> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).get_mut(method)?.pop_front()
    }

    /// Carries a call out, or what is planned instead.
    pub(super) async fn around<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<T, SiteError>>,
    ) -> Result<T, SiteError> {
        turns::pause(method).await;
        let done = self.carry_out(method, call).await;
        let failed = done.as_ref().err();
        trace::note(format_args!("{method}: {:?}", failed.map(|error| (error.kind, &error.message))));
        turns::pause(method).await;
        done
    }

    async fn carry_out<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<T, SiteError>>,
    ) -> Result<T, SiteError> {
        let failed = |kind| SiteError::new(kind, format!("{method}: an injected fault"));
        match self.take(method) {
            None => call.await,
            Some(HostFault::Fail(kind)) => Err(failed(kind)),
            Some(HostFault::FailAfter(kind)) => {
                call.await?;
                Err(failed(kind))
            }
            Some(HostFault::HangAfter) => {
                let answer = call.await;
                self.hung.add_permits(1);
                std::future::pending::<()>().await;
                answer
            }
            Some(HostFault::Hang(release)) => {
                self.hung.add_permits(1);
                // A closed semaphore releases as well.
                let _permit = release.acquire().await;
                call.await
            }
        }
    }
}
