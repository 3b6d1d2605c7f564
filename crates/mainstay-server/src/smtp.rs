//! Mails by SMTP.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use async_trait::async_trait;
use lettre::{
    Address, AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor,
    message::{Mailbox, header::ContentType},
    transport::smtp::{
        authentication::Credentials,
        client::{Certificate, Tls, TlsParameters},
        extension::ClientId,
    },
};
use mainstay_control::alerts::{AlertSender, Mail, SendError};
use serde::{Deserialize, Serialize};

/// How the connection to the mail server is secured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SmtpTls {
    /// It begins in plain text and must then be secured (port 587).
    #[default]
    StartTls,
    /// It is secured from its beginning (port 465).
    Tls,
    /// Not at all (port 25); without a password.
    None,
}

/// The mail server that alerts go to, and whom they are from. Section `[smtp]` of the server's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmtpConfig {
    /// Its name or address.
    pub host: String,
    /// Its port; by default what is usual for the security.
    #[serde(default)]
    pub port: Option<u16>,
    /// How the connection is secured.
    #[serde(default)]
    pub tls: SmtpTls,
    /// Certificates (PEM) to trust besides the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Who signs in; nobody without it.
    #[serde(default)]
    pub user: Option<String>,
    /// File that holds the password and nothing else.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The address that mails are from.
    pub sender: String,
    /// The owners' addresses: who gets alerts when the alert setting says that owners do.
    #[serde(default)]
    pub owners: Vec<String>,
}

/// How long the mail server may take for a step of the conversation.
const STEP_MAX: Duration = Duration::from_secs(30);

/// Sends mails as the configuration says.
pub(crate) struct Smtp {
    transport: AsyncSmtpTransport<Tokio1Executor>,
    sender: Mailbox,
    /// What follows the `@` in the identifiers of mails.
    name: String,
}

impl Smtp {
    /// Reads what the configuration names; nothing is connected yet. `name` is the server's own.
    pub(crate) fn open(config: &SmtpConfig, name: &str) -> anyhow::Result<Self> {
        let address = |text: &str| -> anyhow::Result<Address> {
            text.parse().with_context(|| format!("smtp: '{text}' is not an e-mail address"))
        };
        let sender = Mailbox::new(Some("Mainstay".to_owned()), address(&config.sender)?);
        for owner in &config.owners {
            address(owner)?;
        }
        let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(&config.host)
            .hello_name(ClientId::Domain(name.to_owned()))
            .timeout(Some(STEP_MAX));
        let tls = match config.tls {
            SmtpTls::None => Tls::None,
            SmtpTls::StartTls => Tls::Required(tls_parameters(config)?),
            SmtpTls::Tls => Tls::Wrapper(tls_parameters(config)?),
        };
        let usual_port = match config.tls {
            SmtpTls::None => 25,
            SmtpTls::StartTls => 587,
            SmtpTls::Tls => 465,
        };
        builder = builder.port(config.port.unwrap_or(usual_port)).tls(tls);
        match (&config.user, &config.password_file) {
            (None, None) => {}
            (Some(_), Some(_)) if config.tls == SmtpTls::None => {
                anyhow::bail!("smtp: a password is sent over TLS only; set tls to \"starttls\" or \"tls\"");
            }
            (Some(user), Some(path)) => {
                let password = std::fs::read_to_string(path)
                    .with_context(|| format!("smtp: read the password from {}", path.display()))?;
                let password = password.trim_end_matches(['\r', '\n']).to_owned();
                builder = builder.credentials(Credentials::new(user.clone(), password));
            }
            _ => anyhow::bail!("smtp: user and password_file belong together; set both or none"),
        }
        Ok(Self { transport: builder.build(), sender, name: name.to_owned() })
    }
}

fn tls_parameters(config: &SmtpConfig) -> anyhow::Result<TlsParameters> {
    let mut parameters = TlsParameters::builder(config.host.clone());
    if let Some(path) = &config.ca_file {
        let pem = std::fs::read(path).with_context(|| format!("smtp: read {}", path.display()))?;
        let certificate = Certificate::from_pem(&pem)
            .with_context(|| format!("smtp: {} is not a certificate in PEM", path.display()))?;
        parameters = parameters.add_root_certificate(certificate);
    }
    parameters.build_rustls().context("smtp: TLS cannot be set up")
}

#[async_trait]
impl AlertSender for Smtp {
    async fn send(&self, to: &str, mail: &Mail) -> Result<(), SendError> {
        let refused = |error: &dyn std::error::Error| SendError::Refused(error.to_string());
        let to: Address = to.parse().map_err(|error: lettre::address::AddressError| refused(&error))?;
        let message = Message::builder()
            .from(self.sender.clone())
            .to(Mailbox::new(None, to))
            .subject(&mail.subject)
            .message_id(Some(format!("<{}@{}>", mail.id, self.name)))
            .header(ContentType::TEXT_PLAIN)
            .body(mail.text.clone())
            .map_err(|error| refused(&error))?;
        match self.transport.send(message).await {
            Ok(_) => Ok(()),
            // A mailbox that is not there, as opposed to a sign-in that fails or a server that takes nothing now: only the
            // former is the recipient's fault, and is told with 550, 551 or 553.
            Err(error) if error.status().is_some_and(|code| [550, 551, 553].contains(&u16::from(code))) => {
                Err(SendError::Refused(causes(&error)))
            }
            Err(error) => Err(SendError::Failed(causes(&error))),
        }
    }
}

/// An error with all its causes, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
