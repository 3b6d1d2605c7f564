//! Mails about what goes wrong.
//!
//! Every event of severity Warning or Critical is owed to those whom the alert setting names. What is owed is a mark on the
//! event itself, written in the same transaction, so that neither a crash nor a mail server that is away loses it. Events
//! are told in digests, one a minute at most: the first at once, a storm in few mails. A mail that was accepted by the mail
//! server just before a crash is sent again.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use mainstay_model::Health;
use tokio_util::sync::CancellationToken;

use crate::{
    Control, ControlError,
    db::{ALERTS_FAILED, EventRecord},
};

/// A mail, without its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mail {
    /// The same whenever the same digest is sent again, so that mail programs show it once.
    pub id: String,
    /// The subject, one line.
    pub subject: String,
    /// The text.
    pub text: String,
}

/// Why a mail did not go out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// This recipient will never get it; asking again is of no use.
    #[error("{0}")]
    Refused(String),
    /// Perhaps later.
    #[error("{0}")]
    Failed(String),
}

/// Brings mails to a mail server. Sending the same mail twice must be possible. Implementations: SMTP in the server, lists in
/// tests.
#[async_trait]
pub trait AlertSender: Send + Sync {
    /// Sends a mail to one recipient; when this returns well, the mail server has taken it.
    async fn send(&self, to: &str, mail: &Mail) -> Result<(), SendError>;
}

/// Shortest time between two digests.
const DIGEST_INTERVAL_MS: i64 = 60_000;
/// Events that a mail lists; it counts the others.
const LISTED_MAX: usize = 100;
/// How long an event is owed: later nobody wants to read it any more.
const OWED_MAX_MS: i64 = 3 * 24 * 3_600_000;
/// How often is looked, against the interval between digests.
const TICK: Duration = Duration::from_secs(1);
/// Wait after the first failure; each further one doubles it.
const RETRY_FIRST_MS: i64 = 5_000;
/// Longest wait between two tries.
const RETRY_MAX_MS: i64 = 600_000;

fn retry_delay_ms(failures: u32) -> i64 {
    RETRY_FIRST_MS.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(RETRY_MAX_MS)
}

/// A digest that is being sent.
struct Digest {
    mail: Mail,
    /// Who has not got it yet.
    recipients: BTreeSet<String>,
}

/// Sends alerts; one for each process.
pub struct Alerts {
    control: Arc<Control>,
    sender: Arc<dyn AlertSender>,
    owners: Vec<String>,
    /// Of the vault, for the subject.
    vault: String,
    digest: Option<Digest>,
    not_before_ms: i64,
    failures: u32,
}

impl Alerts {
    /// A sender of alerts for a vault whose owners have these addresses.
    pub fn new(
        control: Arc<Control>,
        sender: Arc<dyn AlertSender>,
        owners: Vec<String>,
        vault: String,
    ) -> Self {
        Self { control, sender, owners, vault, digest: None, not_before_ms: 0, failures: 0 }
    }

    /// Sends what is owed until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                // A mail server that hangs must not hold the end up: what it has not taken is owed still.
                () = stop.cancelled() => return,
                result = self.pass() => if let Err(error) = result {
                    // What is owed stays owed.
                    tracing::warn!(%error, "alerts could not be looked at");
                },
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    /// Looks once, and sends what is due.
    pub async fn pass(&mut self) -> Result<(), ControlError> {
        let now_ms = self.control.clock.now_ms();
        if now_ms < self.not_before_ms {
            return Ok(());
        }
        if self.digest.is_none() {
            self.digest = self.next_digest(now_ms).await?;
        }
        let Some(digest) = &mut self.digest else { return Ok(()) };
        let mut failure = None;
        for recipient in digest.recipients.clone() {
            match self.sender.send(&recipient, &digest.mail).await {
                Ok(()) => {
                    metrics::counter!("mainstay_alert_mails", "result" => "sent").increment(1);
                    digest.recipients.remove(&recipient);
                }
                Err(SendError::Refused(reason)) => {
                    metrics::counter!("mainstay_alert_mails", "result" => "refused").increment(1);
                    digest.recipients.remove(&recipient);
                    let text = format!("an alert to '{recipient}' was refused: {reason}");
                    self.control
                        .record_event(event(&self.control, Health::Warning, &self.vault, text))
                        .await?;
                }
                Err(SendError::Failed(reason)) => {
                    metrics::counter!("mainstay_alert_mails", "result" => "failed").increment(1);
                    failure = Some(reason);
                }
            }
        }
        if let Some(reason) = failure {
            self.failures = self.failures.saturating_add(1);
            self.not_before_ms = now_ms + retry_delay_ms(self.failures);
            // Once for each time that the mail server is away.
            if self.failures == 1 {
                let text = format!("alerts cannot be sent, and are tried again: {reason}");
                self.control.record_event(event(&self.control, Health::Warning, &self.vault, text)).await?;
            }
            return Ok(());
        }
        self.control.db.forget_alerts().await?;
        self.digest = None;
        self.not_before_ms = now_ms + DIGEST_INTERVAL_MS;
        if std::mem::take(&mut self.failures) > 0 {
            let text = "alerts are sent again".to_owned();
            self.control.record_event(event(&self.control, Health::Normal, &self.vault, text)).await?;
        }
        Ok(())
    }

    /// What is owed now, if anything.
    async fn next_digest(&self, now_ms: i64) -> Result<Option<Digest>, ControlError> {
        let owed = self.control.db.claim_alerts(now_ms - OWED_MAX_MS, LISTED_MAX).await?;
        if owed.count == 0 {
            return Ok(None);
        }
        let setting = self.control.alert_setting().await?;
        let owners: &[String] = if setting.tells_owners { &self.owners } else { &[] };
        let recipients: BTreeSet<_> = owners.iter().chain(&setting.addresses).cloned().collect();
        if recipients.is_empty() {
            // Nobody wants to know; whoever is named later does not get what was before.
            self.control.db.forget_alerts().await?;
            return Ok(None);
        }
        Ok(Some(Digest { mail: compose(&self.vault, owed.count, &owed.newest), recipients }))
    }
}

fn event(control: &Control, severity: Health, vault: &str, text: String) -> EventRecord {
    control.event("VaultHealth", ALERTS_FAILED, severity, text, vault.to_owned(), String::new())
}

/// The mail about some events, of which the newest are told.
fn compose(vault: &str, count: usize, newest: &[EventRecord]) -> Mail {
    let critical = newest.iter().filter(|event| event.severity == Health::Critical).count();
    let subject = match newest {
        [only] if count == 1 => format!("{:?}: {}", only.severity, only.description),
        _ if critical > 0 => format!("{count} events, {critical} of them critical"),
        _ => format!("{count} events"),
    };
    let mut text = String::new();
    for event in newest {
        let time = Timestamp::from_millisecond(event.time_ms).unwrap_or_default();
        let site = if event.fabric.is_empty() { String::new() } else { format!(" ({})", event.fabric) };
        text.push_str(&format!(
            "{time}  {:?}  {}{site}\r\n    {}\r\n    {} {}\r\n\r\n",
            event.severity,
            one_line(&event.affected_object),
            one_line(&event.description),
            event.kind,
            event.code,
        ));
    }
    if count > newest.len() {
        text.push_str(&format!("and {} earlier ones.\r\n\r\n", count - newest.len()));
    }
    text.push_str(&format!("Vault {vault}: `mainstay event list` shows all events.\r\n"));
    let id = newest.first().map_or_else(String::new, |event| event.id.clone());
    Mail { id, subject: format!("[Mainstay {vault}] {}", one_line(&subject)), text }
}

/// Longest line of what an event tells.
const LINE_MAX: usize = 400;

fn one_line(text: &str) -> String {
    text.chars().take(LINE_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owed(number: u32, severity: Health) -> EventRecord {
        EventRecord {
            id: format!("event-{number}"),
            time_ms: 0,
            code: "HealthChanged".to_owned(),
            kind: "VmHealth".to_owned(),
            severity,
            description: format!("what\r\nBcc: happened {number}"),
            affected_object: "vm1".to_owned(),
            fabric: "home".to_owned(),
        }
    }

    #[test]
    fn one_event_is_told_in_the_subject_and_on_one_line() {
        let mail = compose("v", 1, &[owed(1, Health::Critical)]);
        assert_eq!(mail.subject, "[Mainstay v] Critical: what  Bcc: happened 1");
        assert!(mail.text.contains("1970-01-01T00:00:00Z  Critical  vm1 (home)"), "{}", mail.text);
    }

    #[test]
    fn many_events_are_counted() {
        let events: Vec<_> = (0..3).map(|number| owed(number, Health::Warning)).collect();
        let mail = compose("v", 1000, &events);
        assert_eq!(mail.subject, "[Mainstay v] 1000 events");
        assert!(mail.text.contains("and 997 earlier ones"), "{}", mail.text);
    }

    #[test]
    fn waits_grow_and_end() {
        assert_eq!([1, 2, 3].map(retry_delay_ms), [5_000, 10_000, 20_000]);
        assert_eq!(retry_delay_ms(u32::MAX), RETRY_MAX_MS);
    }
}
