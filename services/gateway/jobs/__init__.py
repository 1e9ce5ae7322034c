"""Jobs over many rows.

Read in this order: specs (what is asked for), tables, views, progress (what is told), sizing and splitting/
(cutting inputs), decisions (what happens next; pure), repository (what is stored, one transaction per
decision), pools (what workers say of themselves), publishing, controller (acts), consumers (records from
Kafka), results and formats (what comes out), watching and events (progress), addresses and callbacks
(webhooks), retention, service (what routes call), routes, runtime (all of it in the background), metrics.
"""
