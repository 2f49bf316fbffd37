-- ARGV: id, record without its body, key of the set of ids whose bodies are in that folder. Only for what failed and is pending nowhere: nobody is about to read the body.
local id = ARGV[1]
local failed = false
local names, whole = destinations()
if not whole then
  return 0
end
for _, name in ipairs(names) do
  if redis.call('ZSCORE', 'smtpdup:pending:' .. name, id) then
    return 0
  end
  failed = failed or redis.call('ZSCORE', 'smtpdup:failed:' .. name, id)
end
if not failed then
  return 0
end
if not redis.call('SET', 'smtpdup:message:' .. id, ARGV[2], 'XX') then
  return 0
end
redis.call('SADD', ARGV[3], id)
return 1
