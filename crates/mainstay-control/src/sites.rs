//! The agents that are connected now.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use mainstay_model::ProviderId;
use mainstay_provider::{ErrorKind, Site, SiteError};
use tokio::sync::watch;

/// Connected agents by identifier. The newest connection of an agent wins.
#[derive(Default)]
pub struct SiteDirectory {
    connected: RwLock<HashMap<ProviderId, Arc<dyn Site>>>,
    /// Agents whose connection nobody has looked at yet.
    arrived: Mutex<HashSet<ProviderId>>,
    registrations: watch::Sender<()>,
}

impl SiteDirectory {
    /// A host was registered, registered again, or removed.
    pub(crate) fn registrations_changed(&self) {
        self.registrations.send_replace(());
    }

    /// Changes whenever connections must be looked at again, whether their hosts may still have them.
    pub fn watch_registrations(&self) -> watch::Receiver<()> {
        self.registrations.subscribe()
    }

    /// An agent has connected.
    pub fn insert(&self, provider: ProviderId, site: Arc<dyn Site>) {
        self.connected.write().unwrap_or_else(PoisonError::into_inner).insert(provider, site);
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).insert(provider);
    }

    /// Whether the agent has connected anew since this was last asked.
    pub fn take_arrival(&self, provider: ProviderId) -> bool {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).remove(&provider)
    }

    /// The connection is gone; a newer one of the same agent stays.
    pub fn remove(&self, provider: ProviderId, site: &Arc<dyn Site>) {
        let mut connected = self.connected.write().unwrap_or_else(PoisonError::into_inner);
        if connected.get(&provider).is_some_and(|present| Arc::ptr_eq(present, site)) {
            connected.remove(&provider);
        }
    }

    /// The agent, if it is connected.
    pub fn get(&self, provider: ProviderId) -> Result<Arc<dyn Site>, SiteError> {
        self.connected.read().unwrap_or_else(PoisonError::into_inner).get(&provider).cloned().ok_or_else(
            || {
                SiteError::new(ErrorKind::Unavailable, format!("agent {provider} is not connected"))
                    .with_remedy("Check that the host, its agent and the network to the server are up.")
            },
        )
    }

    /// Whether the agent is connected.
    pub fn is_connected(&self, provider: ProviderId) -> bool {
        self.connected.read().unwrap_or_else(PoisonError::into_inner).contains_key(&provider)
    }
}

/// A host's answer, if it comes in time; `to` names what it is asked, for the error.
pub(crate) async fn answer_within<T, E: From<SiteError>>(
    limit: Duration,
    to: &str,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
        let message = format!("the host did not answer to {to} within {} s", limit.as_secs());
        Err(SiteError::new(ErrorKind::TimedOut, message).into())
    })
}
