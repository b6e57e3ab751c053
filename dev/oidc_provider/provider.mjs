// A provider of OpenID Connect that we did not write, for tests: node provider.mjs FOLDER PORT REDIRECT
// FOLDER has server.pem, a certificate with its key. Anybody may sign in, as LOGIN@example.com; ada is of the group sre.
import { readFileSync } from "node:fs";
import { createServer } from "node:https";
import { join } from "node:path";
import Provider from "oidc-provider";

const [folder, port, redirect] = process.argv.slice(2);
const pem = readFileSync(join(folder, "server.pem"));
const provider = new Provider(`https://127.0.0.1:${port}`, {
  clients: [{
    client_id: "webhook gateway",
    client_secret: "s3cret: of 7+ characters & more",
    redirect_uris: [redirect],
    grant_types: ["authorization_code"],
    response_types: ["code"],
  }],
  claims: { email: ["email", "email_verified"], groups: ["groups"] },
  conformIdTokenClaims: false, // claims of scopes in the ID token, as companies' providers have them
  cookies: { keys: ["of a test"] },
  features: { devInteractions: { enabled: true } },
  findAccount: (_, id) => ({
    accountId: id,
    claims: async () => ({
      sub: id,
      email: `${id}@example.com`,
      email_verified: id !== "eve",
      groups: id === "ada" ? ["staff", "sre"] : ["staff"],
    }),
  }),
  pkce: { required: () => true },
});
createServer({ cert: pem, key: pem }, provider.callback()).listen(Number(port), "127.0.0.1", () => console.log("ready"));
